"""The search for learning rates, on losses that are a known function of the rates."""

import math
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pretrain_lib.tuning.search import (
    CANDIDATES,
    SPREAD,
    Space,
    candidates,
    expected_trials,
    find_rates,
    vertex,
)

TOKENS = 9 * 4096


def bowl(best, trial, *, diverges_above=math.inf, shift=0.0):
    """A loss that is quadratic in the logarithms, and whose best rates fall in longer runs."""
    distances = [
        math.log2(rate / (b * (TOKENS / trial.tokens) ** shift))
        for rate, b in zip(trial.rates, best, strict=True)
    ]
    if any(rate > diverges_above for rate in trial.rates):
        return math.nan
    return 4.0 + 0.05 * sum(d * d for d in distances) - 0.01 * math.log(trial.tokens)


@pytest.mark.parametrize("number", [1, 2, 3])
@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_the_best_rates_are_found(number, data):
    best = [data.draw(st.floats(1e-4, 1e-1)) for _ in range(number)]
    off = [data.draw(st.floats(1 / SPREAD, SPREAD)) for _ in range(number)]
    shift = data.draw(st.floats(0, 0.3))
    space = Space(tuple(b * o for b, o in zip(best, off, strict=True)), TOKENS)
    found = find_rates(space, partial(bowl, best, shift=shift))
    for rate, b in zip(found.trial.rates, best, strict=True):
        assert rate == pytest.approx(b, rel=0.02)
    assert found.trial.tokens == TOKENS


@given(factor=st.floats(8, 64), up=st.booleans())
@settings(max_examples=20, deadline=None)
def test_rates_beyond_the_candidates_are_followed(factor, up):
    best = 1e-2 * (factor if up else 1 / factor)
    found = find_rates(Space((1e-2,), TOKENS), partial(bowl, (best,)))
    assert found.trial.rates[0] == pytest.approx(best, rel=0.02)


def test_runs_that_diverge_are_worse_than_all_others():
    found = find_rates(
        Space((4e-2, 1e-2), TOKENS), partial(bowl, (4e-2, 2e-2), diverges_above=3e-2)
    )
    assert 2e-2 < found.trial.rates[0] <= 3e-2
    assert math.isfinite(found.loss)


def test_a_search_without_any_finite_loss_is_refused():
    with pytest.raises(ValueError, match="lower the recipe's learning rates"):
        find_rates(Space((1e-2,), TOKENS), lambda trial: math.nan)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_no_trial_is_evaluated_twice_and_their_number_is_as_expected(number):
    seen = []

    def evaluate(trial):
        seen.append(trial)
        return bowl((1.1e-2,) * number, trial)

    space = Space((1e-2,) * number, TOKENS)
    find_rates(space, evaluate)
    assert len(seen) == len(set(seen))
    expected, tokens = expected_trials(space), [trial.tokens for trial in seen]
    rounds = sum(count < TOKENS for count in expected)
    assert tokens[:rounds] == expected[:rounds]
    # A neighbor may be a candidate, and where a neighbor is better the line goes on.
    assert len(expected) - 2 <= len(tokens) <= len(expected) + 2 * number
    assert set(tokens[rounds:]) == {TOKENS}


def test_a_search_cut_short_goes_on_as_it_would_have():
    space, whole = Space((1e-2, 3e-2), TOKENS), []

    def remember(trial):
        whole.append(trial)
        return bowl((2e-2, 1e-2), trial)

    found = find_rates(space, remember)
    for cut in (1, len(whole) // 2, len(whole) - 1):
        known, new = set(whole[:cut]), []

        def go_on(trial, known=known, new=new):
            if trial not in known:
                new.append(trial)
            return bowl((2e-2, 1e-2), trial)

        assert find_rates(space, go_on) == found
        assert new == whole[cut:]


def test_the_candidates_are_spread_over_the_whole_range():
    space = Space((1e-3, 1e-2, 1e-1), TOKENS)
    points = candidates(space)
    assert points[0] == space.center
    assert len(set(points)) == 3 * CANDIDATES
    for index, center in enumerate(space.center):
        logs = sorted(math.log(p[index] / center, SPREAD) for p in points)
        assert -1.001 <= logs[0] < -0.8 and 0.8 < logs[-1] <= 1.001
        assert max(b - a for a, b in zip(logs, logs[1:], strict=False)) < 0.35


@given(st.floats(-0.5, 0.5), st.floats(0.01, 10))
def test_the_vertex_is_that_of_the_parabola(place, curvature):
    values = [curvature * (x - place) ** 2 + 3 for x in (-1, 0, 1)]
    assert vertex(*values) == pytest.approx(place, abs=1e-6)


def test_a_diverged_neighbor_moves_nothing():
    assert vertex(5.0, 4.0, math.inf) == 0
    assert vertex(4.0, 4.0, 4.0) == 0
