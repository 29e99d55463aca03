"""The README's scripts run as they stand there, and its commands exist."""

import re

import pytest

from tests.conftest import ROOT, run_pretrain, run_python

TEXT = (ROOT / "README.md").read_text()
SCRIPTS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_scripts_run_and_learn(number, tmp_path):
    assert len(SCRIPTS[number].splitlines()) < 40
    script = tmp_path / "script.py"
    script.write_text(SCRIPTS[number])
    call = f"runpy.run_path({str(script)!r}, run_name='__main__')"
    code = f"import os, runpy; os.chdir({str(tmp_path)!r}); {call}"
    result = run_python("-c", code)
    assert result.returncode == 0, result.stderr
    losses = re.findall(r"(?<!_)loss'?:? '?(\d+(?:\.\d+)?)", result.stdout)
    losses = [float(loss) for loss in losses]
    assert len(losses) == 30, result.stdout
    assert losses[0] == pytest.approx(7.62, abs=0.3)  # ln 2048
    assert losses[-1] < losses[0] - 1


def test_no_figure_is_missing():
    variables = r"HF_HUB_OFFLINE|HF_TOKEN|RUN_DIR|MAX_RESTARTS|PET_RDZV_ID|TORCH_[A-Z_]+"
    variables += "|FULL_STATE_DICT"
    assert not re.findall(r"\b[A-Z]+_[A-Z_]+\b", re.sub(variables, "", TEXT))


def test_every_file_that_is_named_exists():
    for name in re.findall(r"(?:recipes|accelerate_configs)/[\w./]+\.(?:py|sh|yaml|md)", TEXT):
        assert (ROOT / name).is_file() or name == "recipes/R.py", name


@pytest.mark.slow
def test_every_setting_that_is_named_exists():
    shown = run_python("recipes/gpt2_124m.py", "--help").stdout
    flags = set(
        re.findall(r"--(?:data|batch|run|model|schedule|optimizer|scores|samples)\.\w+", TEXT)
    )
    assert len(flags) > 10
    for flag in flags:
        assert f"{flag} " in shown, flag


def test_every_subcommand_that_is_named_exists():
    shown = run_pretrain("--help").stdout
    for name in set(re.findall(r"^    pretrain (\w+)", TEXT, re.MULTILINE)):
        assert re.search(rf"^ +{name} ", shown, re.MULTILINE), name
