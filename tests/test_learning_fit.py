"""The analysis of the learning benchmark, on losses that follow a known law."""

import importlib
import json
import math
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.moderate

sys.path.insert(0, str(ROOT / "benchmarks"))
learning_fit = importlib.import_module("learning_fit")
Fit, Point = learning_fit.Fit, learning_fit.Point

LAW = Fit(floor=2.0, a=30.0, alpha=0.32, b=60.0, beta=0.36)
SIZES = {64: 330_000, 96: 640_000, 128: 1_060_000}
HORIZONS = (65_536, 131_072, 262_144)


def points(contender, law, *, factor=1.0, seeds=(0.0,)):
    """Points of a contender that needs `factor` of the law's tokens."""
    return [
        Point(contender, width, n, d, tuple(law(n, d / factor) + seed for seed in seeds))
        for width, n in SIZES.items()
        for d in HORIZONS
    ]


def test_tokens_between_and_beyond_runs():
    curve = [(1000, 6.0), (2000, 5.0), (4000, 4.5)]
    assert learning_fit.tokens_to_reach(5.5, curve) == (
        pytest.approx(1000 * math.sqrt(2)),
        False,
    )
    assert learning_fit.tokens_to_reach(7.0, curve) == (pytest.approx(500), True)
    assert learning_fit.tokens_to_reach(4.0, curve) == (pytest.approx(8000), True)


def test_a_contender_that_needs_half_of_the_tokens_has_the_ratio_one_half():
    law = Fit(floor=0.0, a=0.0, alpha=0.1, b=20.0, beta=0.12)
    both = points("adamw", law, seeds=(0.0, 0.01, -0.01))
    both += points("muon", law, factor=0.5, seeds=(0.0, 0.01, -0.01))
    found = learning_fit.ratios(both)
    assert len(found) == 9
    for ratio in found:
        assert ratio.value == pytest.approx(0.5, rel=0.08 if ratio.beyond else 0.02)
        assert ratio.spread < 0.02
        assert ratio.beyond == (ratio.tokens == HORIZONS[0])


def test_the_fit_is_the_law():
    found = learning_fit.fit_law(points("adamw", LAW))
    for n in SIZES.values():
        for d in HORIZONS:
            assert found(n, d) == pytest.approx(LAW(n, d), abs=1e-3)
    assert (found.alpha, found.beta) == pytest.approx((0.32, 0.36), abs=0.05)


def test_the_extrapolation_covers_the_law_where_losses_scatter():
    noisy = points("adamw", LAW, seeds=(0.02, -0.02, 0.0))
    value, low, high = learning_fit.extrapolate(noisy)
    truth = LAW(learning_fit.FAR_PARAMETERS, learning_fit.FAR_TOKENS)
    assert low <= truth <= high and low < value < high


def test_runs_of_a_search_are_not_compared():
    run = {"contender": "muon", "width": 64, "parameters": 1, "tokens": 9, "seed": 1, "loss": 5.0}
    runs = [run | {"compared": True}, run | {"compared": False, "loss": 9.0}]
    runs.append(run | {"compared": True, "seed": 2, "loss": 6.0})
    (point,) = learning_fit.points_of(runs)
    assert point.losses == (5.0, 6.0) and point.mean == 5.5


def test_what_there_is_is_reported_and_drawn(tmp_path, capsys):
    runs = {
        f"{p.contender}{p.width}{p.tokens}": {
            "contender": p.contender,
            "width": p.width,
            "parameters": p.parameters,
            "tokens": p.tokens,
            "seed": 1,
            "loss": p.mean,
            "compared": True,
        }
        for p in points("adamw", LAW) + points("muon", LAW, factor=0.5)
    }
    out = tmp_path / "learning.json"
    learning_fit.report(json.loads(json.dumps({"runs": runs})), out)
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "extrapolated to 1.24e+08 parameters" in capsys.readouterr().out
    learning_fit.report({"runs": {}}, tmp_path / "none.json")
    assert not (tmp_path / "none.png").exists()
