"""The time budget: what is still to come is counted before it begins."""

import time

from accelerate import Accelerator

from pretrain_lib.training.early_stop import STARTED, StopWatch


def test_the_budget_is_used_up_though_the_clock_is_set_back(monkeypatch):
    monkeypatch.setenv(STARTED, str(time.time() - 100))
    watch, opened = StopWatch(Accelerator(cpu=True), max_time=150.0), time.monotonic()
    try:
        monkeypatch.setattr(time, "time", lambda: 0.0)
        assert watch.reason() is None
        monkeypatch.setattr(time, "monotonic", lambda: opened + 60)
        assert watch.reason() == "run.max_time=150s is used up"
    finally:
        watch.close()


def test_the_budget_counts_the_step_what_is_due_after_it_and_the_save(monkeypatch):
    monkeypatch.setenv(STARTED, str(time.time() - 100))
    watch = StopWatch(Accelerator(cpu=True), max_time=200.0)
    try:
        watch.longest_step, watch.longest_save, watch.longest_evaluation = 10.0, 20.0, 40.0
        assert watch.reason() is None  # 100 + 15 + 40
        assert watch.reason(evaluation_next=True) == "run.max_time=200s is used up"  # and 60
        watch.max_time = 150.0
        assert watch.reason() == "run.max_time=150s is used up"
    finally:
        watch.close()
