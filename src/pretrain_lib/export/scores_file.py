"""Scores for a model card from a file of lm-eval results, which must be those of the model."""

from pathlib import Path

import torch

from pretrain_lib.evaluate.scored import Score, read_results, scores_of_results
from pretrain_lib.models.flops import count_parameters
from pretrain_lib.models.interface import Model
from pretrain_lib.models.weight_files import INDEX, WEIGHTS, read_tensors

HALVES_APART = 2.0**-7  # relative: how far bf16 and fp16 may round the same number apart


def scores_of_file(path: Path, checkpoint: Path, model: Model) -> tuple[tuple[Score, ...], str]:
    """Return the scores in a file of lm-eval results, and what made them.

    Raises ValueError if they are those of another model: of another number of parameters than
    `model`, or of a folder that still exists and has other weights than `checkpoint`.
    """
    results = read_results(path)
    parameters = results["config"].get("model_num_parameters")
    if parameters not in (None, count := count_parameters(model)):
        raise ValueError(
            f"scores={path} has the scores of a model of {parameters:,} parameters, but this one "
            f"has {count:,}: give the scores of this model"
        )
    scored = _scored_folder(results["config"])
    if scored is not None and not _has_same_weights(scored, checkpoint):
        raise ValueError(
            f"scores={path} has the scores of {scored}, whose weights are not those of "
            f"{checkpoint}: score that with pretrain eval, or export {scored}"
        )
    by = f"lm-evaluation-harness {results.get('lm_eval_version', '')}".strip()
    limit = results["config"].get("limit")
    by = f"{by}; the first {limit:g} items of each task" if limit else by
    return scores_of_results(results), by


def _scored_folder(config: dict) -> Path | None:
    """Return the folder that was scored, None if it is not known or has no weights any more."""
    arguments = config.get("model_args")
    if isinstance(arguments, str):  # as of older versions of lm-eval: a=b,c=d
        pairs = (pair.partition("=") for pair in arguments.split(","))
        arguments = {name: value for name, _, value in pairs}
    name = arguments.get("pretrained") if isinstance(arguments, dict) else None
    folder = Path(name) if isinstance(name, str) else None
    if folder is None or not any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
        return None
    return folder


def _has_same_weights(one: Path, other: Path) -> bool:
    """Return whether the tensors of two model folders are equal, or the same ones cast.

    A tensor that only one of them has, such as a head that is tied in the other, is passed over.
    """
    if one.resolve() == other.resolve():
        return True
    tensors = dict(read_tensors(other))  # memory-mapped
    return all(_are_same(t, tensors[name]) for name, t in read_tensors(one) if name in tensors)


def _are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    if {one.dtype, other.dtype} == {torch.bfloat16, torch.float16}:
        return torch.allclose(one.float(), other.float(), rtol=HALVES_APART, atol=1e-7)
    narrow = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(one.to(narrow), other.to(narrow))
