"""The README says what was measured: its table is what the results make it."""

import sys

from tests.conftest import run_command


def test_the_table_of_the_readme_is_that_of_the_results():
    result = run_command(sys.executable, "benchmarks/table.py", "--check")
    assert result.returncode == 0, result.stderr
