"""Refuse flags that nothing reads, so that nobody believes that they have an effect.

Only flags: an overlay may be the whole `config.yaml` of a run, and what a recipe says of its own
text stays true beside a folder that a flag names.
"""

from collections.abc import Callable
from typing import Any

from pretrain_lib.config.derived_defaults import Given, listed, manifest_of
from pretrain_lib.config.settings import DataConfig, Recipe, plain
from pretrain_lib.data.prepare.holdout import parse_validation
from pretrain_lib.data.tokens.foreign import is_foreign, names_tokens
from pretrain_lib.values import as_written, show

AGAIN = "prepare the text again, into another folder"
PREPARING = ("train_tokenizer", "text_field", "document_separator")  # what only `source` needs
# Settings, the one that decides whether they are read, by which values, and what to set it to.
Decided = tuple[tuple[str, ...], str, Callable[[Any], bool], str]
DECIDED: tuple[Decided, ...] = (
    (("optimizer.momentum",), "optimizer.kind", lambda kind: kind == "muon", "muon"),
    (
        ("schedule.decay_tokens", "schedule.decay_fraction", "schedule.decay_shape"),
        "schedule.kind",
        lambda kind: kind == "wsd",
        "wsd",
    ),
    (
        ("schedule.final_fraction",),
        "schedule.kind",
        lambda kind: kind != "constant",
        "cosine, linear or wsd",
    ),
    (
        ("stability.spike_action", "stability.spike_window"),
        "stability.spike_sigma",
        lambda sigma: sigma is not None,
        "a number such as 6",
    ),
    (("data.train_tokenizer",), "data.tokenizer", lambda name: name is None, "null"),
    (("data.spool_tokens",), "data.streaming", bool, "true"),
)


def refuse_unread(config: Recipe, flags: Given) -> None:
    """Raise ValueError for one of the `flags` of a run that has no effect on it.

    A flag that repeats the default is accepted.
    """
    chosen = {name: value for name, value in flags.items() if value != _default(config, name)}
    for names, decider, is_read, remedy in DECIDED:
        value = _value(config, decider)
        for name in filter(chosen.__contains__, names):
            if not is_read(value):
                reason = f"has no effect with {decider}={_written(value)}"
                raise _unread(name, chosen, reason, f"set {decider} to {remedy}")
    if config.data.path is not None and config.data.source is None:
        _refuse_for_prepared(config.data, chosen, flags)


def _refuse_for_prepared(data: DataConfig, chosen: Given, flags: Given) -> None:
    """Raise ValueError for what prepared folders have decided when they were made."""
    paths = listed(data.path)
    for name in (f"data.{name}" for name in PREPARING):
        if name in chosen:
            reason = f"is not read: data.path={show(data.path)} holds tokens already"
            raise _unread(name, chosen, reason, f"{AGAIN} (data.source)")
    read = [*paths, data.validation] if names_tokens(data.validation) else paths
    if "data.dtype" in chosen and not any(map(is_foreign, read)):
        reason = f"is not read: data.path={show(data.path)} says of which type its ids are"
        raise _unread("data.dtype", chosen, reason, "")
    wanted = flags.get("data.validation", "none")
    if wanted == "none" or names_tokens(wanted):
        return
    for path in paths:
        prepared = (manifest_of(path) or {}).get("validation", "none")
        if prepared != "none" and parse_validation(wanted) != parse_validation(prepared):
            reason = f"is not read: data.path={path} was prepared with {prepared}"
            raise _unread("data.validation", flags, reason, AGAIN)


def _unread(name: str, given: Given, reason: str, remedy: str) -> ValueError:
    remedy = f", or {remedy}" if remedy else ""
    return ValueError(f"--{name} {_written(given[name])} {reason}; leave it out{remedy}")


def _written(value: Any) -> str:
    return show(as_written(plain(value)))


def _value(config: Recipe, name: str) -> Any:
    section, _, field = name.partition(".")
    return getattr(getattr(config, section), field)


def _default(config: Recipe, name: str) -> Any:
    """Return the default of a setting where its section has one."""
    section, _, field = name.partition(".")
    return getattr(type(getattr(config, section)), field, None)
