"""Settings that were not given follow those that were: vocabulary, prompts, tasks, lengths."""

import shutil

import pytest

from pretrain_lib import prepare
from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.config.units import TokenCount
from pretrain_lib.data.prepare.job import Job
from tests.conftest import VOCABULARY, change


def parse(recipe, *arguments, presets=None):
    return parse_recipe(recipe, presets=presets, arguments=[str(a) for a in arguments])[0]


@pytest.fixture
def published(recipe):
    """A recipe with a text, a tokenizer, a vocabulary, prompts and tasks of its own."""
    data = {"path": None, "source": "owner/text", "tokenizer": "gpt2", "train_tokenizer": None}
    return change(
        recipe,
        model={"vocabulary_size": 50257},
        data=data,
        samples={"prompts": ["Hello"]},
        scores={"tasks": ["hellaswag"]},
    )


@pytest.fixture
def overlay(tmp_path):
    file = tmp_path / "overlay.yaml"
    file.write_text(
        "data: {source: python-stdlib, tokenizer: null, train_tokenizer: 300}\n"
        "schedule: {tokens: 4096, warmup_tokens: 256}\n"
    )
    return file


def test_the_recipe_on_its_own_text_is_the_recipe(published):
    assert parse(published) == published
    assert parse(published, "--data.source", "owner/text") == published


def test_text_of_ones_own_has_its_own_vocabulary_prompts_and_no_tasks(published, prepared):
    config = parse(published, "--data.path", prepared)
    assert config.model.vocabulary_size == VOCABULARY
    assert config.samples.prompts is None
    assert config.scores.tasks == []
    trained = parse(published, "--data.source", "python-stdlib", "--data.train_tokenizer", "300")
    assert trained.model.vocabulary_size == 300
    loaded = ["--data.source", "python-stdlib", "--data.tokenizer", prepared / "tokenizer"]
    assert parse(published, *loaded).model.vocabulary_size == VOCABULARY


def test_what_is_asked_for_stays(published, prepared):
    flags = ["--model.vocabulary_size", "1024", "--samples.prompts", "[a]", "--scores.tasks", "[b]"]
    config = parse(published, "--data.path", prepared, *flags)
    assert config.model.vocabulary_size == 1024
    assert config.samples.prompts == ["a"]
    assert config.scores.tasks == ["b"]


def test_the_recipes_text_prepared_beforehand_is_the_recipes_text(published, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a b c " * 400)
    job = Job((str(text),), train_tokenizer=260, validation="first:100")
    prepare(job, tmp_path / "data", quiet=True)
    own = change(published, data={"source": str(text)})
    config = parse(own, "--data.path", tmp_path / "data")
    assert config.scores.tasks == ["hellaswag"]
    assert config.samples.prompts == ["Hello"]
    assert config.model.vocabulary_size == 50257


def test_weights_that_a_run_begins_with_keep_their_vocabulary(published, prepared):
    flags = ["--data.path", prepared, "--run.initial_weights", "gpt2"]
    assert parse(published, *flags).model.vocabulary_size == 50257


def test_a_mixture_has_the_largest_vocabulary(published, prepared, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a b c " * 400)
    prepare(Job((str(text),), train_tokenizer=260, validation="none"), tmp_path / "d", quiet=True)
    config = parse(published, "--data.path", f"[{tmp_path / 'd'}, {prepared}]")
    assert config.model.vocabulary_size == VOCABULARY


def test_a_folder_named_by_a_flag_replaces_the_source_of_an_overlay(
    published, prepared, overlay, tmp_path
):
    config = parse(published, "--config", overlay, "--data.path", prepared)
    assert config.data.source is None and config.data.train_tokenizer is None
    assert config.model.vocabulary_size == VOCABULARY
    # A folder that is not there yet is where the overlay's text goes.
    config = parse(published, "--config", overlay, "--data.path", tmp_path / "new")
    assert config.data.source == "python-stdlib"
    assert config.model.vocabulary_size == 300


def test_what_an_overlay_says_of_its_own_text_does_not_hold_for_another(published, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "data: {source: python-stdlib, train_tokenizer: 300, tokenizer: null}\n"
        "samples: {prompts: ['def ']}\nscores: {tasks: [mine]}\nmodel: {vocabulary_size: 999}\n"
    )
    config = parse(published, "--config", overlay)
    assert config.samples.prompts == ["def "] and config.scores.tasks == ["mine"]
    assert config.model.vocabulary_size == 999
    config = parse(published, "--config", overlay, "--data.source", "other.txt")
    assert config.samples.prompts is None and config.scores.tasks == []
    assert config.model.vocabulary_size == 300
    flags = ["--data.source", "other.txt", "--samples.prompts", "[x]"]
    assert parse(published, "--config", overlay, *flags).samples.prompts == ["x"]
    # An overlay that names no text speaks of whatever text there is.
    overlay.write_text("samples: {prompts: [y]}")
    config = parse(published, "--config", overlay, "--data.source", "other.txt")
    assert config.samples.prompts == ["y"]


def test_a_folder_made_from_the_source_of_an_overlay_belongs_to_it(published, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a b c " * 400)
    job = Job((str(text),), train_tokenizer=300, validation="first:100")
    prepare(job, tmp_path / "data", quiet=True)
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(f"data: {{source: {text}, train_tokenizer: 300, tokenizer: null}}")
    flags = ["--config", overlay, "--data.path", tmp_path / "data"]
    first = parse(published, *flags)
    assert first.data.source == str(text)
    shutil.rmtree(tmp_path / "data")
    assert parse(published, *flags) == first  # the same before and after it is prepared


def test_epochs_replace_the_recipes_tokens(published, overlay):
    config = parse(published, "--schedule.epochs", "3")
    assert (config.schedule.tokens, config.schedule.epochs) == (None, 3.0)
    config = parse(published, "--config", overlay, "--schedule.epochs", "3")
    assert (config.schedule.tokens, config.schedule.epochs) == (None, 3.0)
    overlay.write_text("schedule: {epochs: 2}")
    config = parse(published, "--config", overlay)
    assert (config.schedule.tokens, config.schedule.epochs) == (None, 2.0)
    config = parse(published, "--config", overlay, "--schedule.tokens", "1M")
    assert (config.schedule.tokens, config.schedule.epochs) == (1_000_000, None)


def test_a_fraction_replaces_the_recipes_tokens_of_warm_up(published, overlay):
    config = parse(published, "--schedule.warmup_fraction", "0.1")
    assert config.schedule.warmup_tokens is None
    assert config.schedule.count_warmup_tokens() == config.schedule.tokens // 10
    config = parse(published, "--config", overlay, "--schedule.warmup_fraction", "0.5")
    assert config.schedule.count_warmup_tokens() == 2048
    config = parse(published, "--config", overlay)
    assert config.schedule.count_warmup_tokens() == 256


def test_tokens_and_a_fraction_of_decay_replace_each_other(published, overlay):
    overlay.write_text("schedule: {kind: wsd, tokens: 4096, decay_fraction: 0.75}")
    config = parse(published, "--config", overlay)
    assert config.schedule.count_decay_tokens() == 3072
    shorter = parse(published, "--config", overlay, "--schedule.tokens", "1000")
    assert shorter.schedule.count_decay_tokens() == 750
    config = parse(published, "--config", overlay, "--schedule.decay_tokens", "512")
    assert config.schedule.count_decay_tokens() == 512
    overlay.write_text("schedule: {kind: wsd, tokens: 4096, decay_tokens: 512}")
    config = parse(published, "--config", overlay, "--schedule.decay_fraction", "0.75")
    assert config.schedule.count_decay_tokens() == 3072
    assert config.schedule.decay_tokens == 0


@pytest.mark.parametrize(("length", "fraction"), [(2500, 0.29), (100, 0.29), (900, 0.6)])
def test_a_fraction_of_decay_is_as_many_tokens(recipe, length, fraction):
    schedule = {"kind": "wsd", "tokens": TokenCount(256 * length), "warmup_tokens": TokenCount(0)}
    exact = TokenCount(256 * round(length * fraction))
    one = change(recipe, schedule=schedule | {"decay_fraction": fraction})
    other = change(recipe, schedule=schedule | {"decay_tokens": exact})
    assert one.learning_rate() == other.learning_rate()
    assert one.with_text(1) == other.with_text(1)
    assert one.learning_rate().decay_steps == round(length * fraction)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tokens": TokenCount(4096), "epochs": 2.0}, "one of the two must be set"),
        (
            {"tokens": None, "epochs": None},
            "schedule.tokens=null and schedule.epochs=null: one of the two must be set",
        ),
        ({"tokens": TokenCount(255), "warmup_tokens": 0}, "tokens=255 is less than one step"),
        ({"continue_at_floor": TokenCount(255)}, "continue_at_floor=255 is less than one step"),
        ({"warmup_tokens": None, "warmup_fraction": None}, "are both null"),
    ],
)
def test_lengths_that_say_nothing_or_too_much_are_refused(recipe, changes, named):
    with pytest.raises(ValueError, match=named):
        change(recipe, schedule=changes).check(processes=1)


def test_epochs_become_tokens_when_the_text_is_known(recipe):
    config = change(recipe, schedule={"tokens": None, "epochs": 2.5, "warmup_tokens": None})
    config.check(processes=1)
    known = config.with_text(10_000)
    assert (known.schedule.tokens, known.schedule.epochs) == (25_000, None)
    assert known.schedule.warmup_tokens == int(0.0375 * 25_000)
    assert known.learning_rate().total_steps == 25_000 // 256
    with pytest.raises(ValueError, match="less than one step"):
        config.with_text(50)


def test_a_stream_has_no_epochs(recipe):
    data = {"streaming": True, "source": "python-stdlib"}
    config = change(recipe, data=data, schedule={"tokens": None, "epochs": 1.0})
    with pytest.raises(ValueError, match=r"schedule\.epochs=1\.0: the length of a stream"):
        config.check(processes=1)
