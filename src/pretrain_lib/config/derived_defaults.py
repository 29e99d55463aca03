"""Replace defaults that no longer apply: text of your own brings its own vocabulary, for example.

`defaults` is the recipe as written, `config` the recipe with what the user gave, and `given` the
values that a preset, an overlay or a flag named, by dotted name.
"""

import dataclasses
from pathlib import Path
from typing import Any

from pretrain_lib.config.settings import DataConfig, Recipe, ScheduleConfig
from pretrain_lib.config.units import TokenCount
from pretrain_lib.data.text.tokenizer import load_tokenizer
from pretrain_lib.data.tokens.foreign import is_foreign
from pretrain_lib.data.tokens.places import open_place
from pretrain_lib.data.tokens.shards import MANIFEST, read_manifest

Given = dict[str, Any]
ORIGIN = ("source", "tokenizer", "train_tokenizer")


def derive_defaults(defaults: Recipe, config: Recipe, *, overlays: Given, flags: Given) -> Recipe:
    """Return `config` without defaults of the recipe that the user's choices replace.

    `overlays` are the values that preset and overlays named, `flags` those of flags. Text of the
    user's own has its own vocabulary and prompts, and is not scored on tasks of the hub that nobody
    asked for.
    """
    given = overlays | flags
    data = _choose_data(config.data, given, flags=flags)
    schedule = _choose_lengths(config.schedule, given, flags=flags)
    config = dataclasses.replace(config, data=data, schedule=schedule)
    if not _is_own_text(defaults, data, given):
        return config
    # What an overlay says about its own text does not hold for another.
    replaced = overlays.get("data.source") not in (None, data.source)
    explicit = flags if replaced else given
    samples, scores, model = config.samples, config.scores, config.model
    if "samples.prompts" not in explicit:
        samples = dataclasses.replace(samples, prompts=None)
    if "scores.tasks" not in explicit:
        scores = dataclasses.replace(scores, tasks=[])
    if not _names_vocabulary(explicit) and config.run.initial_weights is None:
        size = _vocabulary_size(data, given) or model.vocabulary_size
        model = model.with_vocabulary_size(size)
    return dataclasses.replace(config, samples=samples, scores=scores, model=model)


def _choose_data(data: DataConfig, given: Given, *, flags: Given) -> DataConfig:
    """Return the data settings without a source or tokenizer that the user's choice replaces.

    With a user's `data.path`, the source and tokenizer of the recipe do not apply, nor those of an
    overlay if a flag names a folder that was prepared from another text. With a user's
    `data.train_tokenizer`, the recipe's tokenizer does not apply.
    """
    origin = {name: given.get(f"data.{name}") for name in ORIGIN}
    if "data.path" in flags and _is_other_text(data):
        origin = {name: flags.get(f"data.{name}") for name in ORIGIN}
    if data.path and origin["source"] is None and not data.streaming:
        return dataclasses.replace(data, **origin)
    if origin["train_tokenizer"] and not origin["tokenizer"]:
        return dataclasses.replace(data, tokenizer=None)
    return data


def _is_other_text(data: DataConfig) -> bool:
    """Return whether no path of `data` was or can be prepared from its source."""
    manifests = [manifest_of(path) for path in listed(data.path)]
    if any(is_foreign(path) for path in listed(data.path)):
        return True
    return any(m is not None and m["sources"] != listed(data.source) for m in manifests)


def _choose_lengths(schedule: ScheduleConfig, given: Given, *, flags: Given) -> ScheduleConfig:
    """Return the schedule without lengths that the user's choice of another unit replaces.

    Epochs replace the recipe's tokens, a fraction its tokens of warm-up or decay, tokens of decay
    its fraction, and a flag what an overlay says of either.
    """
    replaced = {}
    for one, other in (("tokens", "epochs"), ("epochs", "tokens")):
        if _replaces(one, other, given, flags=flags):
            replaced[other] = None
    if _replaces("warmup_fraction", "warmup_tokens", given, flags=flags):
        replaced["warmup_tokens"] = None
    if _replaces("decay_fraction", "decay_tokens", given, flags=flags):
        replaced["decay_tokens"] = TokenCount(0)
    if _replaces("decay_tokens", "decay_fraction", given, flags=flags):
        replaced["decay_fraction"] = None
    return dataclasses.replace(schedule, **replaced)


def _replaces(one: str, other: str, given: Given, *, flags: Given) -> bool:
    """Return whether `one` of the schedule's settings was chosen instead of an `other` one."""
    one, other = f"schedule.{one}", f"schedule.{other}"
    chosen = given.get(one) is not None and other not in given
    return chosen or (flags.get(one) is not None and other not in flags)


def _is_own_text(defaults: Recipe, data: DataConfig, given: Given) -> bool:
    """Return whether the text is another than that of the recipe."""
    recipes = listed(defaults.data.source)
    if data.source is not None:
        return listed(data.source) != recipes or "data.train_tokenizer" in given
    sources = [(manifest_of(path) or {}).get("sources") for path in listed(data.path)]
    return bool(sources) and any(source != recipes for source in sources)


def _names_vocabulary(asked: Given) -> bool:
    return "model.vocabulary_size" in asked or "vocab_size" in asked.get("model.changes", ())


def _vocabulary_size(data: DataConfig, given: Given) -> int | None:
    """Return the number of ids of the tokenizer that the user chose, None if there is none."""
    if data.source is None:
        sizes = [m["vocabulary_size"] for p in listed(data.path) if (m := manifest_of(p))]
        return max(sizes, default=None)
    if data.tokenizer is None:
        return data.train_tokenizer
    # What is on the Hub is loaded when the run starts, not to print its settings.
    exists = "data.tokenizer" in given and Path(data.tokenizer).expanduser().exists()
    return load_tokenizer(data.tokenizer).vocabulary_size if exists else None


def manifest_of(path: str) -> dict | None:
    """Return the manifest of a prepared folder, None for anything else."""
    if is_foreign(path):
        return None
    folder = open_place(path)
    return read_manifest(folder) if (folder / MANIFEST).is_file() else None


def listed(value: str | list[str] | None) -> list[str]:
    """Return a setting that is one name or several as a list."""
    return [value] if isinstance(value, str) else list(value or ())
