"""Settings: what is read, what is refused, and what follows from them."""

import re
import sys
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pretrain_lib import (
    DataConfig,
    GPT2Config,
    LearningRate,
    LlamaConfig,
    OptimizerConfig,
    Recipe,
    RunConfig,
    SampleConfig,
    ScheduleConfig,
    SystemConfig,
)
from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.config.units import ByteCount, Duration, TokenCount
from pretrain_lib.models.rope import RopeScaling
from tests.conftest import change


def parse(recipe, *arguments, presets=None):
    return parse_recipe(recipe, presets=presets, arguments=[str(a) for a in arguments])[0]


@pytest.mark.parametrize(
    ("text", "count"),
    [("524288", 524288), ("524_288", 524288), ("375M", 375_000_000), ("10e9", 10**10)]
    + [("2.5B", 2_500_000_000), ("1T", 10**12), ("4K", 4000), (2**19, 2**19), (1e6, 10**6)],
)
def test_token_counts_are_read_exactly(text, count):
    assert TokenCount.parse(text) == count


@given(st.integers(0, 10**15))
def test_any_whole_number_of_tokens_survives(count):
    assert TokenCount.parse(str(count)) == count


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("45s", 45), ("30m", 1800), ("2h", 7200), ("1.5d", 129600)]
)
def test_durations_are_read(text, seconds):
    assert Duration.parse(text) == seconds


@pytest.mark.parametrize(
    ("text", "size"),
    [("500MB", 5 * 10**8), ("2GB", 2 * 10**9), ("1.5GiB", 3 * 2**29), ("1KB", 1000)],
)
def test_sizes_are_read(text, size):
    assert ByteCount.parse(text) == size


@pytest.mark.parametrize("text", ["", "2", "GB", "-1GB", "2 GB", "2gb", "1PB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="is not a size such as"):
        ByteCount.parse(text)


def test_later_settings_win(recipe, tmp_path):
    first, second = tmp_path / "1.yaml", tmp_path / "2.yaml"
    first.write_text("run: {seed: 1}\nlog: {every: 5}\nbatch: {micro_batch: 4}")
    second.write_text("run: {seed: 2}")
    presets = {"wide": {"model.width": 64, "log.every": 9, "run.seed": 9}}
    flags = ["--run.seed", 3, "--config", first, f"--config={second}", "--preset", "wide"]
    config = parse(recipe, *flags, presets=presets)
    assert config.run.seed == 3  # a flag, though it stands before the overlays
    assert config.log.every == 5  # an overlay over the preset
    assert config.batch.micro_batch == 4
    assert config.model.width == 64  # the preset over the recipe
    assert parse(recipe, *flags[2:5], presets=presets).run.seed == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--batch.token", "256"], "--batch.token"),  # an abbreviation
        (["--run.nonsense", "1"], "--run.nonsense"),
        (["--batch.tokens", "many"], "batch.tokens"),
        (["--batch.tokens", "1.2.3"], "batch.tokens"),
        (["--batch.tokens", "1.5"], "batch.tokens"),
        (["--preset"], "--preset"),
        (["--run.max_time", "soon"], "run.max_time"),
        (["--preset", "huge"], "huge"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_cannot_be_read_ends_with_one_line(recipe, arguments, named):
    with pytest.raises(ValueError, match=re.escape(named)) as refused:
        parse(recipe, *arguments)
    assert "\n" not in str(refused.value)


def test_an_unknown_yaml_key_is_refused(recipe, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("batch: {tokns: 5}")
    with pytest.raises(ValueError, match=r"batch\.tokns is no setting; did you mean batch\.tokens"):
        parse(recipe, "--config", overlay)


@pytest.mark.parametrize("key", ["model", "optimizer", "data.source", "scores.tasks"])
def test_an_overlay_imports_no_module(recipe, tmp_path, monkeypatch, key):
    (tmp_path / "imported_by_an_overlay.py").write_text("class Thing: ...")
    monkeypatch.syspath_prepend(tmp_path)
    value = {"class_path": "imported_by_an_overlay.Thing", "init_args": {}}
    for name in reversed(key.split(".")):
        value = {name: value}
    (tmp_path / "overlay.yaml").write_text(yaml.safe_dump(value))
    with pytest.raises(ValueError, match=re.escape(key)):
        parse(recipe, "--config", tmp_path / "overlay.yaml")
    assert "imported_by_an_overlay" not in sys.modules


def test_the_settings_written_are_the_settings_read(recipe, tmp_path):
    config = parse(recipe, "--schedule.tokens", "10e9", "--run.max_time", "30m")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config.to_dict()))
    assert parse(recipe, "--config", file) == config


def test_a_batch_that_does_not_divide_names_the_nearest_that_does(recipe):
    config = change(recipe, batch={"tokens": TokenCount(500_000), "micro_batch": 16})
    config = change(config, batch={"sequence_length": 32})
    with pytest.raises(ValueError, match=r"batch\.tokens=500000 .*8 processes x 16 .* = 4096; n"):
        config.check(processes=8)
    nearest = change(config, batch={"tokens": TokenCount(499_712)})
    long = {"tokens": TokenCount(10**9), "warmup_tokens": TokenCount(0)}
    change(nearest, schedule=long).check(processes=8)


def test_the_parts_of_a_step_are_counted_with_their_nouns(recipe):
    odd = change(recipe, batch={"tokens": 100, "micro_batch": 1})
    with pytest.raises(ValueError, match=r"multiple of 1 process x 1 sequence x 32 tokens = 32;"):
        odd.check(processes=1)


def test_a_context_longer_than_the_models_is_refused(recipe):
    with pytest.raises(ValueError, match=r"batch\.sequence_length=64 .* model\.context_length=32"):
        change(recipe, batch={"sequence_length": 64}).check(processes=1)


def test_the_ramp_is_in_windows_and_has_to_divide(recipe):
    ramp = {"ramp_from": TokenCount(64), "ramp_increment": TokenCount(64)}
    with pytest.raises(ValueError, match="go together"):
        change(recipe, batch=ramp).check(processes=1)
    config = change(recipe, batch=ramp | {"ramp_tokens": TokenCount(1024)})
    config.check(processes=1)
    sizes = config.batch_sizes()
    assert [sizes.at(step) for step in (0, 10_000)] == [2, 8]
    with pytest.raises(ValueError, match=r"batch\.ramp_from=64"):
        config.check(processes=2)


def test_under_a_ramp_a_save_is_due_where_the_tokens_pass_a_multiple(recipe):
    ramp = {"ramp_from": 64, "ramp_increment": 64, "ramp_tokens": 768}
    sizes = [64] * 4 + [128] * 2 + [192] + [256] * 9  # of each step, in tokens
    for every in range(32, 1200, 32):
        checkpoint = {"every": None, "every_tokens": every}
        config = change(recipe, batch=ramp, checkpoint=checkpoint)
        totals = [0, *accumulate(sizes)]
        passed = [after // every > before // every for before, after in pairwise(totals)]
        due = [config.save_is_due(step, totals[step]) for step in range(1, len(totals))]
        assert due == passed, every


@pytest.mark.parametrize(("max_steps", "last"), [(None, 8), (5, 5), (8, 8), (100, 8)])
def test_a_run_ends_with_its_schedule_or_before(recipe, max_steps, last):
    assert change(recipe, run={"max_steps": max_steps}).last_step() == last


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("log", {"every": 0}),
        ("validation", {"every": 0}),
        ("run", {"max_steps": -1}),
        ("samples", {"every": 0}),
        ("batch", {"micro_batch": 0}),
        ("optimizer", {"max_grad_norm": 0.0}),
    ],
)
def test_numbers_that_make_no_sense_are_refused(recipe, section, values):
    name = f"{section}.{next(iter(values))}"
    with pytest.raises(ValueError, match=rf"{name}=.* must be"):
        change(recipe, **{section: values}).check(processes=1)


def test_a_model_without_heads_is_refused():
    with pytest.raises(
        ValueError, match=r"model\.num_heads=0 must be a whole number of at least 1"
    ):
        GPT2Config(num_heads=0)


def test_warm_up_longer_than_the_run_is_refused(recipe):
    config = change(recipe, schedule={"warmup_tokens": TokenCount(10**6)})
    with pytest.raises(ValueError, match=r"schedule\.warmup_tokens"):
        config.check(processes=1)


@pytest.mark.parametrize("decay", [0, 255])  # tokens, of which a step has 256
def test_a_plateau_without_a_decay_is_called_constant(recipe, decay):
    schedule = {"kind": "wsd", "tokens": 2560, "decay_tokens": decay}
    if decay:  # what is left of a step belongs to the decay
        change(recipe, schedule=schedule).check(processes=1)
        return
    with pytest.raises(ValueError, match="decay_tokens=0.*wsd.* 512 .*, or take .*kind=constant"):
        change(recipe, schedule=schedule).check(processes=1)
    change(recipe, schedule=schedule | {"kind": "constant"}).check(processes=1)


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_a_kind_without_a_last_phase_needs_no_room_for_one(recipe, kind):
    left = {"tokens": 2560, "warmup_tokens": 1280, "decay_tokens": 1536}
    changed = change(recipe, schedule=left | {"kind": kind})
    changed.check(processes=1)
    assert changed.learning_rate().decay_steps == 0
    with pytest.raises(ValueError, match=r"5 steps.* and decay \(6 steps\) do not fit .*10 steps"):
        change(recipe, schedule=left | {"kind": "wsd"}).check(processes=1)


def test_a_folder_named_by_the_user_is_taken_without_the_recipes_own_source(recipe):
    recipe = change(recipe, data={"path": None, "source": "a/b", "tokenizer": "gpt2"})
    taken = parse(recipe, "--data.path", "folder").data
    assert (taken.source, taken.tokenizer) == (None, None)
    named = parse(recipe, "--data.path", "x.bin", "--data.tokenizer", "gpt2").data
    assert (named.source, named.tokenizer) == (None, "gpt2")  # given, though it is the recipe's own
    trained = parse(recipe, "--data.source", "c.txt", "--data.train_tokenizer", "300").data
    assert (trained.tokenizer, trained.train_tokenizer) == (None, 300)
    made = parse(recipe, "--data.path", "folder", "--data.source", "c.txt").data
    assert (made.source, made.tokenizer) == ("c.txt", "gpt2")


@pytest.mark.parametrize(
    ("growth", "due"), [(1.0, [4, 8, 12, 16, 20]), (2.0, [4, 12, 28]), (1.5, [4, 10, 19, 32])]
)
def test_intervals_between_samples_may_grow(growth, due):
    samples = SampleConfig(every=4, growth=growth)
    assert [step for step in range(33) if samples.is_due(step)][: len(due)] == due


def count_types(value):
    if isinstance(value, dict | list | tuple):
        items = value.values() if isinstance(value, dict) else value
        return set().union(*map(count_types, items))
    return {type(value)}


def test_numbers_of_numpy_are_recorded_as_those_of_python(recipe):
    changed = change(
        recipe,
        data={"weights": [np.float32(0.5), np.float64(0.25)], "workers": np.uint8(2)},
        optimizer={"betas": (np.float32(0.5), np.float64(0.25)), "learning_rate": np.float64(0.25)},
        schedule={"tokens": 1e6, "warmup_tokens": np.float32(1024), "final_fraction": np.int8(0)},
        run={"seed": np.int64(7), "max_time": np.float32(90)},
        system={"profile": (np.int64(2), np.int32(3))},
    )
    for _ in range(2):  # as it is made, and checked
        found = changed.to_dict()
        assert found["optimizer"]["betas"] == [0.5, 0.25]
        assert (found["schedule"]["tokens"], found["schedule"]["warmup_tokens"]) == (10**6, 1024)
        assert found["system"]["profile"] == [2, 3]
        assert count_types(found) <= {int, float, str, bool, type(None)}
        assert yaml.safe_load(yaml.safe_dump(found)) == found
        changed.check(processes=1)


def test_models_and_schedules_take_the_numbers_of_numpy():
    for config in (
        GPT2Config(num_layers=np.int64(2), dropout=np.float32(0.5)),
        LlamaConfig(num_layers=np.int64(2), rope_scaling=RopeScaling("linear", np.float32(2))),
    ):
        assert count_types(vars(config)) <= {int, float, str, bool, type(None), RopeScaling}
    numbers = np.float32(0.5), np.float64(0.25), np.int64(5), np.uint16(20)
    rate = LearningRate("cosine", *numbers)
    assert rate == LearningRate("cosine", 0.5, 0.25, 5, 20)
    assert {type(rate(step)) for step in range(25)} == {float}


def test_paths_of_pathlib_are_recorded_as_text():
    data = DataConfig(path=[Path("a"), "b"], source=Path("c"), tokenizer=Path("d"))
    run = RunConfig(dir=Path("e"), resume=Path("f"), initial_weights=Path("g"))
    recipe = Recipe(model=GPT2Config(), data=data, run=run)
    recipe.check_values()
    found = recipe.to_dict()
    assert found["data"]["path"] == ["a", "b"]
    assert [found["data"][name] for name in ("source", "tokenizer")] == ["c", "d"]
    assert [found["run"][name] for name in ("dir", "resume", "initial_weights")] == list("efg")
    assert count_types(found) <= {int, float, str, bool, type(None)}
    assert DataConfig(path=Path("a")) == DataConfig(path="a")


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        (OptimizerConfig(betas=(0.9,)), r"optimizer\.betas=\(0\.9,\) must be two numbers"),
        (OptimizerConfig(betas=(0.9, 0.9, 0.9)), r"optimizer\.betas=.* must be two numbers"),
        (SystemConfig(profile=(3,)), r"system\.profile=\(3,\) must be two whole numbers"),
        (ScheduleConfig(tokens=1.5), r"schedule\.tokens=1\.5 must be a number of tokens"),
        (ScheduleConfig(tokens="1e6"), r"schedule\.tokens=1e6 \(str\) must be a number of tokens"),
        (ScheduleConfig(tokens=True), r"schedule\.tokens=True must be a number of tokens"),
        (DataConfig(workers=np.int64(2**40)), r"data\.workers=\d+ must be .* at most 4,096"),
        (DataConfig(max_rejected=np.int64(2**40)), r"must be .* at least 0 and at most 2,147"),
        (DataConfig(workers="4"), r"data\.workers=4 \(str\) must be a whole number"),
        (DataConfig(document_masking="true"), r"document_masking=true \(str\) must be true or fa"),
        (DataConfig(document_masking=1), r"document_masking=1 must be true or false"),
    ],
)
def test_what_python_gives_is_refused_with_its_type_if_it_reads_like_a_value(section, expected):
    name = type(section).__name__.removesuffix("Config").lower()
    with pytest.raises(ValueError, match=expected):
        Recipe(model=GPT2Config(), **{name: section}).check(processes=1)
