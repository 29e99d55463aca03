"""Select the published GPT-2 and GPT-3 scores that are comparable with a run."""

from collections.abc import Sequence

from pretrain_lib.corpus.origin import find_origins
from pretrain_lib.data.prepare.holdout import parse_validation
from pretrain_lib.evaluate.references import Figure, find_figure, models_near

FAMILY = "GPT-"
# The published validation losses are those of the first 100M tokens of this source.
SOURCE, HELD_OUT, VOCABULARY = "HuggingFaceFW/fineweb-edu:sample-10BT", "first:100e6", 50257


def loss_baselines(settings: Sequence[dict]) -> list[Figure]:
    """Return the published validation losses, if all runs validate on the same text.

    `settings` are those of the runs' manifests, empty if unknown.
    """
    if not settings or not all(_validates_on_recipe_text(each) for each in settings):
        return []
    return _published(settings, "validation", "loss")


def score_baselines(settings: Sequence[dict], task: str, metric: str) -> list[Figure]:
    """Return the published scores on a task, by one metric, of models of similar size."""
    return _published(settings, task, metric)


def _published(settings: Sequence[dict], task: str, metric: str) -> list[Figure]:
    names = [name for each in settings for name in models_near(_rough_size(each))]
    figures = [find_figure(name, task, metric) for name in dict.fromkeys(names)]
    return [figure for figure in figures if figure and figure.model.startswith(FAMILY)]


def _rough_size(settings: dict) -> float:
    """Return the approximate parameter count of a run's model, by the formula for GPT-2."""
    model = settings.get("model", {})
    layers, width = model.get("num_layers", 0), model.get("width", 0)
    return 12 * layers * width**2 + model.get("vocabulary_size", 0) * width


def _validates_on_recipe_text(settings: dict) -> bool:
    if settings.get("model", {}).get("vocabulary_size") != VOCABULARY:
        return False
    origins = find_origins(settings["data"])
    sources = [source.partition("@")[0] for origin in origins for source in origin.sources]
    rules = [settings["data"]["validation"], *(origin.validation for origin in origins)]
    wanted = parse_validation(HELD_OUT)
    return sources == [SOURCE] and all(rule and _is_rule(rule, wanted) for rule in rules)


def _is_rule(rule: str, wanted: tuple) -> bool:
    try:
        return parse_validation(rule) == wanted
    except ValueError:  # not a rule but the path of another text
        return False
