"""The time that is left: only what was measured, and near to what then comes."""

import pytest
import torch

from pretrain_lib.config.units import TokenCount
from pretrain_lib.training.measurements import (
    LAST_SAVE,
    SAMPLING,
    SAVE,
    SCORING,
    VALIDATION,
    Memory,
    TimeLeft,
    events_ahead,
    peak_memory,
)
from tests.conftest import change

STEP, VALIDATING, SAVING, OVERLAPPED = 2.0, 30.0, 9.0, 4.0  # seconds of the simulated run
EVERY = 20  # steps


def ahead(recipe, step, **kinds):
    flags = {"validates": True, "scores": False, "samples": False} | kinds
    return events_ahead(recipe, step=step, **flags)


@pytest.fixture
def long(recipe):
    return change(
        recipe,
        schedule={"tokens": TokenCount(100 * 256)},
        validation={"every": EVERY},
        checkpoint={"every": EVERY},
    )


def simulate(recipe, *, speeds=None, first=STEP):
    """Yield `(step, estimate, seconds that were left)` of a run by the loop's own order."""
    times = TimeLeft()
    last, told, clock, saving = recipe.last_step(), [], 0.0, False
    sizes = recipe.batch_sizes()

    def spend(seconds):
        nonlocal clock
        clock += seconds
        return seconds

    times.note_evaluation(VALIDATION, spend(VALIDATING))
    for step in range(1, last + 1):
        seconds = (first if step == 1 else (speeds or (lambda _: STEP))(step)) + saving * OVERLAPPED
        times.note_step(windows=sizes.at(step - 1), seconds=spend(seconds))
        if saving:
            times.note_saved(SAVING)
        windows = sizes.before(last) - sizes.before(step)
        told.append((step, clock, times.estimate(windows=windows, ahead=ahead(recipe, step))))
        saving = False
        if step % EVERY == 0 or step == last:
            times.note_evaluation(VALIDATION, spend(VALIDATING))
            saving = step != last
            times.note_save_begun(0.0)
    spend(SAVING)
    return [(step, estimate, clock - now) for step, now, estimate in told]


def test_nothing_is_told_before_it_is_measured(long):
    told = simulate(long, first=500.0)  # the first step waits for a compiler
    assert [estimate for _, estimate, _ in told[:2]] == [None, None]
    assert told[2][1].seconds < 500
    assert not told[2][1].is_complete  # no save has been measured yet
    assert all(estimate.is_complete for _, estimate, _ in told[EVERY:])


def test_the_estimate_is_what_then_comes(long):
    for step, estimate, actual in simulate(long, first=500.0):
        if step > EVERY:
            assert estimate.seconds == pytest.approx(actual, abs=OVERLAPPED), step
        elif estimate is not None:
            assert actual - 5 * SAVING <= estimate.seconds <= actual, step


def test_the_estimate_follows_the_recent_steps(long):
    told = simulate(long, speeds=lambda step: STEP if step <= 30 else 3 * STEP)
    _, estimate, actual = told[-11]
    assert estimate.seconds == pytest.approx(actual, rel=0.1)


def test_a_growing_batch_is_not_taken_for_a_full_one(long):
    ramp = {"ramp_from": TokenCount(64), "ramp_increment": TokenCount(64)}
    config = change(long, batch=ramp | {"ramp_tokens": TokenCount(6400)})
    config = change(config, schedule={"warmup_tokens": TokenCount(0)})
    sizes = config.batch_sizes()
    told = simulate(config, speeds=lambda step: 0.5 * sizes.at(step - 1))
    step, estimate, actual = told[40]
    assert sizes.at(step) < sizes.full
    assert estimate.seconds == pytest.approx(actual, rel=0.05)


@pytest.mark.parametrize("growth", [1.0, 1.5])
def test_events_are_counted_as_they_come(recipe, growth):
    config = change(
        recipe,
        schedule={"tokens": TokenCount(61 * 256)},
        validation={"every": 7},
        scores={"every": 61},
        samples={"every": 4, "growth": growth},
        checkpoint={"every": None, "every_tokens": TokenCount(700)},
    )
    last = config.last_step()
    for step in range(1, last + 1):
        coming = range(step, last)
        found = ahead(config, step, scores=True, samples=True)
        assert found[VALIDATION] == 1 + sum(s % 7 == 0 for s in coming)
        assert found[SCORING] == 1
        assert found[SAMPLING] == 1 + sum(config.samples.is_due(s) for s in coming)
        assert found[SAVE] == sum(config.save_is_due(s, s * 256) for s in coming)
        assert found[LAST_SAVE] == 1
    assert not any(ahead(config, 3, validates=False)[kind] for kind in (VALIDATION, SCORING))


def test_the_peak_memory_is_that_of_the_process():
    before = peak_memory(torch.device("cpu"))
    assert before.kind == "RAM" and 50e6 < before.peak_bytes < 100e9
    assert [Memory("RAM", n).gigabytes() for n in (4e8, 9.999e9, 78.4e9, 141.2e9)] == [
        "0.40",
        "10.0",
        "78.4",
        "141",
    ]
