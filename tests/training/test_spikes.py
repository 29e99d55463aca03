"""Spikes: told from the steps before, left out or turned back from, on all ranks alike."""

import json
import math
import random
import statistics
from pathlib import Path

import pytest
import torch

from pretrain_lib import GPT2, open_corpus, start_accelerator, train
from pretrain_lib.checkpoint.state import read_state
from pretrain_lib.config.units import TokenCount
from pretrain_lib.optim.spikes import Limits, describe_skip, spike_limits
from pretrain_lib.training.checkpoint_choice import check_resume
from tests.conftest import change, read_rows

pytestmark = pytest.mark.moderate

STEPS, WINDOW = 16, 4


def test_limits_are_the_mean_plus_so_many_deviations_of_the_last_steps():
    draw = random.Random(0)
    recent = [[draw.gauss(3, 1), draw.gauss(1, 0.1)] for _ in range(20)]
    limits = spike_limits(recent, sigma=6.0, window=8)
    for limit, column in zip(
        (limits.loss, limits.norm), zip(*recent[-8:], strict=True), strict=True
    ):
        mean = math.fsum(column) / 8
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in column) / 8)
        assert limit == pytest.approx(mean + 6 * deviation)
        assert statistics.fmean(column) < limit


@pytest.mark.parametrize(("sigma", "steps"), [(None, 20), (6.0, 7)])
def test_there_is_no_limit_unless_asked_for_and_not_before_enough_steps(sigma, steps):
    assert spike_limits([[1.0, 1.0]] * steps, sigma=sigma, window=8) == Limits(math.inf, math.inf)


def test_a_reason_names_what_was_too_high():
    limits = Limits(loss=3.0, norm=2.0)
    assert "the loss 4.0000 is above 3.0000" in describe_skip(4.0, 1.0, limits)
    assert "the gradient norm 5 is above 2" in describe_skip(1.0, 5.0, limits)
    assert "the gradient norm is nan" in describe_skip(1.0, math.nan, limits)


class Spiking(GPT2):
    """A GPT-2 whose loss is `factor` times as large on the windows that begin with these ids."""

    spikes: tuple = ()
    factor = 1.0
    calls_left = math.inf

    def forward(self, input_ids, targets=None, **options):
        if self.training:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise KeyboardInterrupt
        result = super().forward(input_ids, targets, **options)
        if targets is None or not self.training:
            return result
        loss, count = result
        hit = any(torch.equal(row[: len(ids)], ids) for row in input_ids for ids in self.spikes)
        return (self.factor * loss if hit else loss), count


def spiking_recipe(recipe, folder, *, every=5, **stability):
    recipe = change(recipe, schedule={"tokens": TokenCount(STEPS * 256)}, samples={"prompts": []})
    recipe = change(recipe, run={"dir": str(folder)}, checkpoint={"every": every})
    limits = {"spike_sigma": 500.0, "spike_window": WINDOW}
    return change(recipe, stability=limits | stability)


def spike_at(recipe, steps):
    """Return the first ids of a window of each of these steps."""
    from pretrain_lib.corpus.corpus import build_dataset

    dataset = build_dataset(recipe, open_corpus(recipe))
    return tuple(dataset[8 * step]["input_ids"] for step in steps)


def run(recipe, steps=(), calls=math.inf, factor=1000.0):
    model = Spiking(recipe.model).initialize(recipe.run.seed)
    model.spikes, model.calls_left = spike_at(recipe, steps), calls
    model.factor = factor
    end = train(recipe, model, open_corpus(recipe), start_accelerator(recipe))
    return end, model


def events(recipe):
    return [row for row in read_rows(recipe.run.dir) if row["kind"] == "event"]


def rows_of_steps(recipe):
    return [row for row in read_rows(recipe.run.dir) if row["kind"] == "train"]


def test_a_spike_is_left_out_and_said(recipe, tmp_path):
    config = spiking_recipe(recipe, tmp_path / "run")
    end, _ = run(config, steps=[9])
    assert end == "done"
    (event,) = events(config)
    assert (event["event"], event["step"]) == ("skipped", 10)
    assert "update left out" in event["message"]
    assert event["loss"] > 1000
    state, _ = read_state(tmp_path / "run" / "checkpoints" / f"step-{STEPS:08d}")
    assert (state.skipped, state.skipped_in_a_row, len(state.recent)) == (1, 0, WINDOW)
    quiet = spiking_recipe(recipe, tmp_path / "quiet")
    run(quiet)
    before, after = rows_of_steps(config), rows_of_steps(quiet)
    assert before[:9] == after[:9]
    assert before[10]["loss"] == pytest.approx(after[10]["loss"], abs=0.2)


def test_a_resumed_run_tells_spikes_as_one_that_never_stopped(recipe, tmp_path):
    whole = spiking_recipe(recipe, tmp_path / "whole")
    run(whole, steps=[6, 12])
    parts = spiking_recipe(recipe, tmp_path / "parts")
    for last in (7, 9, None):
        end, _ = run(change(parts, run={"max_steps": last}), steps=[6, 12])
    assert end == "done"
    assert rows_of_steps(parts) == rows_of_steps(whole)
    assert [event["step"] for event in events(parts)] == [7, 13]
    assert events(parts) == events(whole)


def test_a_run_turns_back_and_goes_on_behind_the_spike(recipe, tmp_path):
    config = spiking_recipe(recipe, tmp_path / "run", spike_action="rollback")
    end, model = run(config, steps=[7])
    assert end == "done"
    (event,) = events(config)
    assert (event["event"], event["step"]) == ("rollback", 6)  # back at step 5
    assert (event["first_window"], event["windows"]) == (5 * 8, 3 * 8)
    assert [row["step"] for row in rows_of_steps(config)] == list(range(1, STEPS + 1))
    # The same as a run that was given the data without those windows.
    other = spiking_recipe(recipe, tmp_path / "other")
    run(change(other, run={"max_steps": 5}))
    jump(tmp_path / "other" / "checkpoints" / "step-00000005", windows=8 * 8)
    _, expected = run(other)
    for one, two in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, two)
    assert [row["loss"] for row in rows_of_steps(config)] == [
        row["loss"] for row in rows_of_steps(other)
    ]


def test_a_run_that_turned_back_has_the_samples_of_each_step_once(recipe, tmp_path):
    config = spiking_recipe(recipe, tmp_path / "run", spike_action="rollback")
    run(change(config, samples={"prompts": ["def "], "every": 2}), steps=[7])
    assert [event["to_step"] for event in events(config)] == [5]  # after samples at step 6
    lines = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(2, STEPS + 1, 2))


def test_a_loss_that_is_not_finite_is_no_spike_to_turn_back_from(recipe, tmp_path):
    config = spiking_recipe(recipe, tmp_path / "run", spike_action="rollback")
    end, _ = run(config, steps=[7], factor=math.inf)
    assert end == "done"
    assert [(event["event"], event["step"]) for event in events(config)] == [("skipped", 8)]


def jump(path, *, windows):
    """Set where a checkpoint goes on in the data, by the files that it consists of."""
    from pretrain_lib.checkpoint.folders import FILES, STATE, describe_files

    state = json.loads((path / STATE).read_text())
    (path / STATE).write_text(json.dumps(state | {"windows": windows}))
    (path / FILES).write_text(json.dumps(describe_files(path)))


# Four calls a step, of which eight led to the spike.
@pytest.mark.parametrize(
    ("calls", "moments"), [(34, "fp32"), (38, "fp32"), (46, "bf16"), (58, "fp32")]
)
def test_a_run_that_ended_after_it_turned_back_tells_it_once(recipe, tmp_path, calls, moments):
    recipe = change(recipe, optimizer={"moments": moments})
    whole = spiking_recipe(recipe, tmp_path / "whole", spike_action="rollback")
    run(whole, steps=[7])
    parts = spiking_recipe(recipe, tmp_path / "parts", spike_action="rollback")
    with pytest.raises(KeyboardInterrupt):
        run(parts, steps=[7], calls=calls)
    run(parts, steps=[7])
    assert [event["event"] for event in events(parts)] == ["rollback"]
    assert read_rows(parts.run.dir) == read_rows(whole.run.dir)


@pytest.mark.parametrize("stops", [(6,), (6, 7), (5, 7), (3,), (6, 13)])
def test_a_run_that_was_stopped_turns_back_as_one_that_was_not(recipe, tmp_path, stops):
    whole = spiking_recipe(recipe, tmp_path / "whole", spike_action="rollback")
    run(whole, steps=[7, 15])
    parts = spiking_recipe(recipe, tmp_path / "parts", spike_action="rollback")
    for last in (*stops, None):
        _, model = run(change(parts, run={"max_steps": last}), steps=[7, 15])
    assert [event["to_step"] for event in events(whole)] == [5, 10]
    assert events(parts) == events(whole)
    assert rows_of_steps(parts) == rows_of_steps(whole)


def test_without_a_checkpoint_a_spike_is_left_out(recipe, tmp_path):
    config = spiking_recipe(recipe, tmp_path / "run", spike_action="rollback", every=None)
    end, _ = run(config, steps=[9])
    assert end == "done"
    assert [event["event"] for event in events(config)] == ["skipped"]


def test_a_run_that_meets_spikes_again_and_again_ends(recipe, tmp_path):
    config = spiking_recipe(recipe, tmp_path / "run", spike_action="rollback")
    with pytest.raises(FloatingPointError, match="3 times the run went back to step 5"):
        run(config, steps=range(6, 40))
    told = [event for event in events(config) if event["event"] == "rollback"]
    assert [(event["step"], event["to_step"]) for event in told] == [(6, 5)] * 3
    assert [event["windows"] for event in told] == [16, 24, 32]


def test_spikes_in_a_row_end_the_run(recipe, tmp_path):
    config = spiking_recipe(recipe, tmp_path / "run", max_skipped=3)
    message = (
        r"3 updates in a row were left out, up to step 9 .* resume from a checkpoint before it"
    )
    with pytest.raises(FloatingPointError, match=message):
        run(config, steps=range(6, STEPS))


@pytest.mark.parametrize(
    ("stability", "text"),
    [
        ({"spike_action": "wait"}, "stability.spike_action=wait must be skip or rollback"),
        ({"spike_window": 1}, "stability.spike_window=1 must be a whole number of at least 2"),
    ],
)
def test_bad_settings_are_refused(recipe, stability, text):
    config = change(recipe, stability=stability)
    with pytest.raises(ValueError, match=text):
        config.check(processes=1)
    assert not Path(recipe.run.dir).exists()


@pytest.mark.parametrize(("keep_last", "stops"), [(1, (6,)), (2, (6, 7)), (3, (6, 7, 8))])
def test_stops_leave_the_checkpoint_to_turn_back_to(recipe, tmp_path, keep_last, stops):
    recipe = change(recipe, checkpoint={"keep_last": keep_last})
    whole = spiking_recipe(recipe, tmp_path / "whole", spike_action="rollback")
    run(whole, steps=[8])
    parts = spiking_recipe(recipe, tmp_path / "parts", spike_action="rollback")
    for last in (*stops, None):
        run(change(parts, run={"max_steps": last}), steps=[8])
    assert [event["to_step"] for event in events(whole)] == [5]
    assert events(parts) == events(whole)
    assert rows_of_steps(parts) == rows_of_steps(whole)


def test_what_is_turned_back_to_was_saved_by_the_settings_of_its_time(recipe, tmp_path):
    config = spiking_recipe(recipe, tmp_path / "run", spike_action="rollback", every=2)
    run(change(config, run={"max_steps": 8}), steps=[9])
    run(change(config, checkpoint={"every": 5}), steps=[9])
    assert [event["to_step"] for event in events(config)] == [8]


def test_a_checkpoint_that_a_rollback_has_dropped_is_no_obstacle(recipe, tmp_path):
    """The command that names it goes on, and the status names a checkpoint that is there."""
    config = spiking_recipe(recipe, tmp_path / "run", spike_action="rollback")
    run(change(config, run={"max_steps": 6}), steps=[7])
    named = tmp_path / "run" / "checkpoints" / "step-00000006"
    back = change(config, run={"resume": str(named)})
    with pytest.raises(KeyboardInterrupt):
        run(back, steps=[7], calls=10)
    assert not named.exists()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["step"] == 5
    check_resume(back)
    assert run(back, steps=[7])[0] == "done"
