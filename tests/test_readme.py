"""The README is short, and its scripts and those of the documentation run as they stand there."""

import re

import pytest

from tests.conftest import ROOT, forked_launchers, run_command, run_python

TEXT = (ROOT / "README.md").read_text()
PYTHON = re.compile(r"```python\n(.*?)```", re.DOTALL)
(EXAMPLE,) = PYTHON.findall(TEXT)
SCRIPTS = PYTHON.findall((ROOT / "docs" / "library.md").read_text())


def run_script(text, folder):
    """Run a script in a folder, in a fork that has imported the library; return what it prints."""
    script = folder / "script.py"
    script.write_text(text)
    call = f"runpy.run_path({str(script)!r}, run_name='__main__')"
    result = run_python("-c", f"import os, runpy; os.chdir({str(folder)!r}); {call}")
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SCRIPTS)))
def test_scripts_run_and_learn(number, tmp_path):
    assert len(SCRIPTS[number].splitlines()) < 40
    printed = run_script(SCRIPTS[number], tmp_path)
    losses = re.findall(r"(?<!_)loss'?:? '?(\d+(?:\.\d+)?)", printed)
    losses = [float(loss) for loss in losses]
    assert len(losses) == 30, printed
    assert losses[0] == pytest.approx(7.62, abs=0.3)  # ln 2048
    assert losses[-1] < losses[0] - 1


def run_on_two_processes(text, folder):
    """Run a script in a folder as the documentation says, in two processes."""
    script = folder / "script.py"
    script.write_text(f"import os\nos.chdir({str(folder)!r})\n{text}")
    flags = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = ["accelerate", "launch", *flags, str(script)]
    return run_command(*command, environment=forked_launchers())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["schedule = ", "class RecurrentModel"])
def test_loops_of_the_documentation_are_the_same_on_two_processes(name, tmp_path):
    (script,) = (script for script in SCRIPTS if name in script)
    (tmp_path / "alone").mkdir()
    alone = run_script(script, tmp_path / "alone")
    counts = 'print(f"process {accelerator.process_index}: {result.targets} targets", flush=True)'
    together = run_on_two_processes(f"{script}\n{counts}", tmp_path)
    assert together.returncode == 0, together.stderr
    losses = [re.findall(r"loss (\d\.\d+)", out) for out in (alone, together.stdout)]
    assert len(losses[0]) == 30
    assert [*map(float, losses[1])] == pytest.approx([*map(float, losses[0])], abs=2e-3)
    for rank in range(2):  # 16 windows of 64 targets a step: of both processes, not of each
        assert f"process {rank}: 1024 targets" in together.stdout
    saved = tmp_path / "runs" / "library" / "model" / "model.safetensors"
    assert saved.is_file() == ("save_pretrained" in script)


@pytest.mark.slow
def test_processes_that_accelerate_counts_as_one_are_refused(tmp_path):
    made = "Accelerator(cpu=not torch.accelerator.is_available())"
    (script,) = (script for script in SCRIPTS if "class RecurrentModel" in script)
    run_script(script, tmp_path)  # the data: both processes would prepare them
    result = run_on_two_processes(script.replace(made, "Accelerator(cpu=False)"), tmp_path)
    assert result.returncode != 0
    assert "accelerator counts 1, torch.distributed 2 processes" in result.stderr


@pytest.mark.slow
def test_a_resumed_loop_of_the_documentation_is_one_without_a_break(tmp_path):
    (script,) = (script for script in SCRIPTS if "train(15)\n" in script)
    printed = []
    for name, text in (("resumed", script), ("whole", script.replace("train(15)\n", ""))):
        (tmp_path / name).mkdir()
        printed.append(run_script(text, tmp_path / name))
    assert printed[0] == printed[1]
    saved = tmp_path / "resumed" / "runs" / "library" / "checkpoints"
    assert {path.name for path in saved.iterdir()} == {"step-00000015", "step-00000030"}


@pytest.mark.slow
def test_the_example_of_the_readme_runs(tmp_path):
    printed = run_script(EXAMPLE, tmp_path)
    (loss,) = re.findall(r"^(\d\.\d\d) nats per token$", printed, re.MULTILINE)
    assert float(loss) == pytest.approx(7.62, abs=0.3)  # ln 2048


def test_the_readme_is_short():
    assert len(TEXT.splitlines()) <= 160


def test_no_figure_is_missing():
    assert not re.findall(r"\b(?:TODO|SAMPLE|OUTPUT|[A-Z]+_[A-Z_]+)\b", TEXT)
