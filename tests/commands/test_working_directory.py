"""Commands in a folder where a user's own scripts have the names of modules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import python_path, read_rows, tiny_flags

pytestmark = pytest.mark.slow

PRETRAIN = Path(sys.executable).with_name("pretrain")
NAMES = ("html", "inspect", "pickle", "pyarrow", "regex", "selectors", "socket", "tokenizers")


@pytest.fixture
def scripts(tmp_path):
    folder = tmp_path / "scripts"
    folder.mkdir()
    for name in NAMES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} of the user')")
    return folder


def run(folder, *words, **variables):
    options = {"cwd": folder, "env": os.environ | {"OMP_NUM_THREADS": "1"} | variables}
    result = subprocess.run(
        [PRETRAIN, *map(str, words)], **options, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert "of the user" not in result.stderr
    return result


@pytest.mark.parametrize("configuration", ["cpu", "cpu_2proc"])
def test_none_of_them_is_imported_by_a_run_or_its_export(
    configuration, prepared, scripts, tmp_path
):
    flags = tiny_flags(prepared, tmp_path / "run")
    run(scripts, "train", "gpt2_124m", "--config_file", configuration, *flags)
    assert read_rows(tmp_path / "run")[-1]["step"] == 8
    run(scripts, "export", tmp_path / "run", "--out", tmp_path / "exported")
    assert (tmp_path / "exported" / "model.safetensors").is_file()


def test_a_recipe_imports_from_its_own_folder_and_from_pythonpath(scripts, tmp_path):
    for name in ("beside", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.py").write_text(f"print('{name} is imported')")
    recipe = tmp_path / "beside" / "recipe.py"
    recipe.write_text("import beside\nimport elsewhere")
    words = ("train", recipe, "--config_file", "cpu")
    said = run(scripts, *words, PYTHONPATH=python_path(tmp_path / "elsewhere")).stdout
    assert said.splitlines()[1:] == ["beside is imported", "elsewhere is imported"]
