"""Learning rates equal their closed forms; batch sizes, their sums and inverses agree."""

import math
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.optim.schedule import BatchSizes, DecayShape, LearningRate, ScheduleKind
from pretrain_lib.training.banner import _schedule_line
from tests.conftest import change

GPT2_RECIPE = LearningRate(
    kind="cosine", peak=6e-4, floor=6e-5, warmup_steps=715, total_steps=19_073
)


def test_cosine_equals_its_closed_form_at_every_step_of_the_gpt2_recipe():
    for step in range(19_073):
        if step < 715:
            expected = 6e-4 * (step + 1) / 715
        else:
            turn = math.pi * (step - 715) / (19_073 - 715)
            expected = 6e-5 + (6e-4 - 6e-5) * (1 + math.cos(turn)) / 2
        assert GPT2_RECIPE(step) == pytest.approx(expected, rel=1e-12)


def test_gpt2_recipe_has_the_published_values_at_its_corners():
    assert GPT2_RECIPE(0) == pytest.approx(8.3916e-07, rel=1e-5)
    assert GPT2_RECIPE(714) == pytest.approx(6e-4) == GPT2_RECIPE(715)
    assert max(map(GPT2_RECIPE, range(19_073))) == pytest.approx(6e-4)
    assert 6e-5 < GPT2_RECIPE(19_072) < 6.0001e-5
    assert {GPT2_RECIPE(step) for step in (19_073, 19_074, 10**6)} == {6e-5}


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from(get_args(ScheduleKind)))
    warmup = draw(st.integers(0, 30))
    decay = draw(st.integers(0, 30)) if kind == "wsd" else 0
    total = warmup + decay + draw(st.integers(0, 60))
    peak = draw(st.floats(1e-6, 1.0))
    floor = peak * draw(st.floats(0.0, 1.0))
    shape = draw(st.sampled_from(get_args(DecayShape)))
    return LearningRate(kind, peak, floor, warmup, total, decay, shape)


@given(schedules())
@settings(deadline=None)
def test_every_kind_rises_linearly_then_never_rises_and_ends_at_its_floor(schedule):
    values = [schedule(step) for step in range(schedule.total_steps + 5)]
    warm, rest = values[: schedule.warmup_steps], values[schedule.warmup_steps :]
    for step, value in enumerate(warm):
        assert value == pytest.approx(schedule.peak * (step + 1) / schedule.warmup_steps)
    slack = 1e-12 * schedule.peak
    assert all(a + slack >= b for a, b in zip(rest, rest[1:], strict=False))
    assert all(schedule.floor - slack <= value <= schedule.peak + slack for value in rest)
    end = schedule.peak if schedule.kind == "constant" else schedule.floor
    assert values[schedule.total_steps :] == [end] * 5


def test_linear_falls_by_the_same_amount_at_every_step():
    schedule = LearningRate("linear", peak=1.0, floor=0.1, warmup_steps=5, total_steps=50)
    values = [schedule(step) for step in range(5, 51)]
    assert values[0] == 1.0 and values[-1] == 0.1
    for before, after in zip(values, values[1:], strict=False):
        assert before - after == pytest.approx(0.9 / 45)


def test_wsd_is_constant_until_its_decay_then_linear():
    schedule = LearningRate("wsd", 1.0, 0.2, warmup_steps=10, total_steps=100, decay_steps=20)
    assert {schedule(step) for step in range(9, 81)} == {1.0}
    for step in range(80, 101):
        assert schedule(step) == pytest.approx(1.0 - 0.8 * (step - 80) / 20)


def test_wsd_without_a_decay_stays_at_its_peak_to_the_end():
    schedule = LearningRate("wsd", 1.0, 0.2, warmup_steps=2, total_steps=10, decay_steps=0)
    assert [schedule(step) for step in range(2, 11)] == [1.0] * 8 + [0.2]


def test_constant_stays_at_its_peak_for_ever():
    schedule = LearningRate("constant", 0.3, 0.0, warmup_steps=3, total_steps=10)
    assert {schedule(step) for step in range(2, 1000)} == {0.3}


def test_unknown_kind_is_refused_with_the_kinds_there_are():
    with pytest.raises(ValueError, match="schedule.kind=exponential .*cosine, linear, constant"):
        LearningRate("exponential", 1.0, 0.1, 1, 10)


@pytest.mark.parametrize("shape", ["1_sqrt", "sqrt", None])
def test_an_unknown_shape_of_the_decay_is_refused_with_the_shapes_there_are(shape):
    with pytest.raises(ValueError, match=f"decay_shape={shape} must be linear, cosine or 1-sqrt"):
        LearningRate("wsd", 1.0, 0.1, 1, 10, decay_steps=5, decay_shape=shape)


@pytest.mark.parametrize(("warmup", "decay"), [(11, 0), (6, 5)])
def test_phases_longer_than_the_schedule_are_refused(warmup, decay):
    with pytest.raises(ValueError, match=f"{warmup} steps.*{decay} steps.*10 steps.*schedule"):
        LearningRate("wsd", 1.0, 0.1, warmup, 10, decay)


@st.composite
def batch_sizes(draw):
    initial = draw(st.integers(1, 12))
    increment = draw(st.integers(1, 6))
    stages = draw(st.integers(0, 5))
    full = initial + stages * increment
    if draw(st.booleans()):
        return BatchSizes(full=full)
    return BatchSizes(full, initial, increment, ramp_windows=draw(st.integers(0, 400)))


@given(batch_sizes())
@settings(deadline=None)
def test_windows_before_a_step_are_the_sum_of_the_steps_before(sizes):
    consumed = 0
    for step in range(120):
        assert sizes.before(step) == consumed
        consumed += sizes.at(step)


@given(batch_sizes(), st.integers(0, 900))
@settings(deadline=None)
def test_steps_within_is_the_largest_number_of_steps_paid_for(sizes, windows):
    steps = 0
    while sizes.before(steps + 1) <= windows:
        steps += 1
    assert sizes.steps_within(windows) == steps


@given(batch_sizes())
@settings(deadline=None)
def test_ramp_rises_through_every_increment_to_the_full_batch(sizes):
    steps = [sizes.at(step) for step in range(1000)]
    assert steps == sorted(steps)
    start = sizes.initial or sizes.full
    assert sorted(set(steps)) == [*range(start, sizes.full, sizes.increment or 1), sizes.full]


@given(batch_sizes())
@settings(deadline=None)
def test_every_stage_of_a_ramp_consumes_its_share_within_half_a_step(sizes):
    steps = [sizes.at(step) for step in range(1000)]
    below = sorted(set(steps) - {sizes.full})
    for size in below:
        share = sizes.ramp_windows / len(below)
        consumed = size * steps.count(size)
        assert consumed == size or abs(consumed - share) <= size / 2


@given(st.integers(1, 1000), st.integers(0, 10**9), st.integers(0, 10**9))
@settings(deadline=None)
def test_without_a_ramp_it_is_plain_multiplication(full, step, windows):
    sizes = BatchSizes(full=full)
    assert sizes.at(step) == full
    assert sizes.before(step) == step * full
    assert sizes.steps_within(windows) == windows // full


@pytest.mark.parametrize(("initial", "increment"), [(3, 2), (4, 0), (4, -1), (9, 1)])
def test_a_ramp_that_misses_the_full_batch_is_refused(initial, increment):
    with pytest.raises(ValueError, match=f"batch.ramp_from .{initial} .*batch.tokens .8 "):
        BatchSizes(full=8, initial=initial, increment=increment, ramp_windows=10)


@pytest.mark.parametrize(
    ("shape", "left"),
    [
        ("linear", lambda p: 1 - p),
        ("cosine", lambda p: (1 + math.cos(math.pi * p)) / 2),
        ("1-sqrt", lambda p: 1 - p**0.5),
    ],
)
def test_wsd_decays_in_each_shape_by_its_closed_form(shape, left):
    schedule = LearningRate("wsd", 1.0, 0.1, 5, 100, decay_steps=40, decay_shape=shape)
    for step in range(5, 110):
        progress = min(1.0, max(0.0, (step - 60) / 40))
        assert schedule(step) == pytest.approx(0.1 + 0.9 * left(progress))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("floor", 2.0),
        ("peak", float("nan")),
        ("peak", -1.0),
        ("warmup_steps", -1),
        ("warmup_steps", 1.5),
        ("total_steps", None),
    ],
)
def test_values_that_are_no_schedule_are_refused_by_name(field, value):
    given = {"kind": "cosine", "peak": 1.0, "floor": 0.0, "warmup_steps": 1, "total_steps": 9}
    with pytest.raises(ValueError, match=f"^{field}="):
        LearningRate(**given | {field: value})


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (
            {"kind": "wsd", "decay_tokens": 3 * 256},
            "2 steps of warm-up to 0.01, then constant, then linear over the last 3 steps to 0.001",
        ),
        ({"kind": "constant"}, "2 steps of warm-up to 0.01, then constant"),
        (
            {"kind": "cosine", "decay_tokens": 768},
            "2 steps of warm-up to 0.01, then cosine to 0.001",
        ),
    ],
)
def test_the_banner_says_how_long_a_decay_is(recipe, schedule, expected):
    assert _schedule_line(change(recipe, schedule=schedule)).endswith(f"rate: {expected}")
