"""A start that fails leaves the process as it was: signals, files, threads."""

import signal
from pathlib import Path

import numpy as np
import pytest

from pretrain_lib import GPT2, open_corpus, start_accelerator, train
from pretrain_lib.errors import SIGNALS
from pretrain_lib.training import run as run_module
from tests.conftest import change

# In the order of a start.
FAILING = ("choose_stretches", "build_dataset", "_start_metrics", "StopWatch", "_build_writer")
FAILING += ("peak_of_all", "StepProfiler", "banner")


def handlers():
    return {number: signal.getsignal(number) for number in SIGNALS}


def start(recipe):
    corpus = open_corpus(recipe)
    train(recipe, GPT2(recipe.model).initialize(0), corpus, start_accelerator(recipe))


@pytest.mark.parametrize("name", FAILING)
def test_whatever_fails_at_the_start_what_was_opened_is_closed(recipe, name, monkeypatch):
    opened, closed, before = [], [], handlers()

    def fail(*_, **__):
        raise ValueError(f"{name} fails")

    def recording(function):
        def opening(*arguments, **options):
            opened.append(function(*arguments, **options))
            close = opened[-1].close
            opened[-1].close = lambda: (close(), closed.append(True))
            return opened[-1]

        return opening

    for function in ("build_dataset", "_start_metrics", "StopWatch"):
        monkeypatch.setattr(run_module, function, recording(getattr(run_module, function)))
    monkeypatch.setattr(run_module, name, fail)
    with pytest.raises(ValueError, match=f"^{name} fails$"):
        start(recipe)
    assert handlers() == before
    assert len(closed) == len(opened) == min(max(FAILING.index(name) - 1, 0), 3)


def test_a_held_out_set_shorter_than_a_window_is_refused_before_the_run_folder(recipe, tmp_path):
    short, before = tmp_path / "short.npy", handlers()
    np.save(short, np.arange(10, dtype=np.uint16))
    array = tmp_path / "train.npy"
    np.save(array, np.arange(5000, dtype=np.uint16) % 50)
    data = {"path": str(array), "validation": str(short)}
    config = change(recipe, data=data, samples={"prompts": []})
    with pytest.raises(ValueError, match="^validation needs one window .* the set has 10"):
        start(config)
    assert handlers() == before
    assert not Path(recipe.run.dir).exists()
