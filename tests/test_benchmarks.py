"""The README says what the benchmarks measured, and each of them can be started."""

import sys

import pytest

from tests.conftest import ROOT, run_command

SCRIPTS = [path for path in (ROOT / "benchmarks").glob("*.py") if "def main(" in path.read_text()]


def test_the_table_of_the_readme_is_that_of_the_results():
    result = run_command(sys.executable, "benchmarks/table.py", "--check")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_a_benchmark_starts_and_explains_its_flags(script):
    result = run_command(sys.executable, script, "--help")
    assert result.returncode == 0 and "--" in result.stdout, result.stderr
