"""Evaluate a model or a model folder with lm-eval: its tasks, requests and metrics."""

import contextlib
import io
import json
import random
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import torch
from accelerate.utils import patch_environment

from pretrain_lib.checkpoint.folders import still_there
from pretrain_lib.data.text.tokenizer import Tokenizer, load_tokenizer
from pretrain_lib.data.text.tokenizer_files import is_of_run
from pretrain_lib.evaluate.error_bars import safe_perplexities
from pretrain_lib.evaluate.item_faults import named_by_harness
from pretrain_lib.evaluate.per_token import add_per_token
from pretrain_lib.evaluate.tasks import Tasks, open_tasks
from pretrain_lib.models.any_model import is_ours, load_pretrained
from pretrain_lib.models.interface import Model, unwrap
from pretrain_lib.models.weight_files import check_weights
from pretrain_lib.wording import in_line

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from transformers import PreTrainedTokenizerBase

    from pretrain_lib.evaluate.live_model import Deal

DTYPES = ("float32", "bfloat16", "float16", "auto")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
# For all but perplexities; the default of lm-eval, 100,000, takes minutes.
BOOTSTRAP_DRAWS = 1000


def evaluate_model(
    model: Model,
    tokenizer: Tokenizer,
    tasks: Tasks,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    num_fewshot: int | None = None,
    log_samples: bool = False,
    deal: "Deal | None" = None,
) -> dict:
    """Run lm-eval on a model in memory and return lm-eval's results, as `evaluate_folder` does.

    The results have an `acc_norm_per_token` for every `acc_norm` (see `add_per_token`). The model
    computes in its own dtype, or under the autocast of the caller. Its training mode and gradients
    and the random number generators are left unchanged. This process must hold the whole weights
    (`whole_weights`). `deal` distributes the work over processes (`all_ranks.lead`). lm-eval
    returns results only where LOCAL_RANK is 0.
    """
    from pretrain_lib.evaluate.live_model import LiveModel, transformers_tokenizer

    model, hf_tokenizer = unwrap(model), transformers_tokenizer(tokenizer)
    with keep_random_state():
        return _run(
            tasks,
            tokenizer=hf_tokenizer,
            model=LiveModel(model, hf_tokenizer, batch_size=batch_size, deal=deal),
            limit=limit,
            batch_size=batch_size,
            device=str(model.head_weight.device),
            num_fewshot=num_fewshot,
            log_samples=log_samples,
        )


def evaluate_folder(
    folder: Path | str,
    tasks: Sequence[str],
    *,
    include_path: Path | str | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | None = None,
    num_fewshot: int | None = None,
    log_samples: bool = False,
    harness: bool = False,
) -> dict:
    """Run lm-eval on a Hugging Face model folder and return lm-eval's results.

    The results have an `acc_norm_per_token` for every `acc_norm` (see `add_per_token`). A folder
    that `is_ours` is scored by `LiveModel`; any other folder, and with `harness` every folder, by
    lm-eval's own `HFLM`. `tasks` are names or patterns of lm-eval tasks or of tasks in YAML files
    below `include_path`; the Python code in these is executed, so they must be trusted. `limit`
    restricts each task to its first items. The random number generators are left unchanged. Raises
    ValueError for a folder without a model, an unknown `dtype` or task, or a dataset that is not
    available.
    """
    folder = Path(folder)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
    computed = {"batch_size": batch_size, "device": device or _default_device()}
    with keep_random_state():
        with still_there(folder):  # read first: a run may remove it while tasks are downloaded
            _check_folder(folder)
            check_weights(folder)
            tokenizer = _tokenizer_of(folder)
            by_harness = harness or not is_ours(folder)
            load = _foreign_model if by_harness else _own_model
            model, arguments = load(folder, tokenizer, dtype=dtype, **computed)
        results = _run(
            open_tasks(tasks, include_path=include_path),
            tokenizer=tokenizer,
            model=model,
            model_args=arguments,
            num_fewshot=num_fewshot,
            limit=limit,
            log_samples=log_samples,
            **computed,
        )
    results["config"]["model_args"].pop("tokenizer", None)  # it is no text
    if by_harness:  # as lm-eval says of one that it loads by name
        results["config"]["model"] = results["model_source"] = "hf"
    return results


def _tokenizer_of(folder: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer that transformers loads from a folder; of a checkpoint, its run's."""
    from transformers import AutoTokenizer

    from pretrain_lib.evaluate.live_model import transformers_tokenizer

    if is_of_run(folder):
        return transformers_tokenizer(load_tokenizer(folder))
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises many types
        raise ValueError(
            f"the tokenizer of {folder} cannot be loaded ({type(error).__name__}: "
            f"{in_line(error)}); copy or export the folder again"
        ) from error


def _foreign_model(
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    dtype: str,
    device: str,
    batch_size: int,
) -> tuple["LM", dict]:
    """Load a folder as lm-eval's own `HFLM`; return it with its arguments."""
    from lm_eval.models.huggingface import HFLM

    arguments = {
        "pretrained": str(folder),
        "dtype": dtype,
        # In bfloat16 a log-likelihood of -140 has no decimal places.
        "softmax_dtype": "float32",
        "use_safetensors": True,
    }
    if is_of_run(folder):
        arguments["tokenizer"] = tokenizer
    return HFLM(**arguments, device=device, batch_size=batch_size), arguments


def _own_model(
    folder: Path,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    dtype: str,
    device: str,
    batch_size: int,
) -> tuple["LM", dict]:
    """Load a folder as a `LiveModel`; return it with the arguments that lm-eval records."""
    from pretrain_lib.evaluate.live_model import LiveModel

    if dtype == "auto":
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        dtype = config.get("dtype") or config.get("torch_dtype") or "float32"
    model = load_pretrained(folder).to(device, getattr(torch, dtype))
    arguments = {"pretrained": str(folder), "dtype": dtype}
    return LiveModel(model, tokenizer, batch_size=batch_size), arguments


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Restore the random state of Python and torch afterwards.

    lm-eval draws from Python's generator when it names a task, and building a model draws from
    torch's. Neither uses NumPy's.
    """
    state = random.getstate()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(state)


def _check_folder(folder: Path) -> None:
    """Raise ValueError for a path that transformers would take for a model name on the Hub."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not a model folder: it has no config.json; give a checkpoint "
            f"(RUN/checkpoints/step-...) or a folder written by `pretrain export`"
        )
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZER_FILES)}): copy the tokenizer that "
            f"the model was trained with into it"
        )


def _run(
    tasks: Tasks,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    log_samples: bool,
    **options: object,
) -> dict:
    """Run lm-eval and return its results, with the configuration that its CLI adds to them."""
    import lm_eval
    import lm_eval.evaluator
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker()
    # Otherwise lm-eval forks a process per core for bootstrapping, although only one does the work.
    # Avoid that in a process with threads and a GPU.
    with (
        patch_environment(DISABLE_MULTIPROC="1"),
        patch.object(lm_eval.evaluator, "get_git_commit_hash", _git_revision),
        named_by_harness(),
        safe_perplexities(),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        results = lm_eval.simple_evaluate(
            tasks=tasks.names,
            task_manager=tasks.manager,
            evaluation_tracker=tracker,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            log_samples=True,
            **options,
        )
    add_per_token(results, tokenizer)
    if not log_samples:
        del results["samples"]
    tracker.general_config_tracker.log_end_time()
    return results | asdict(tracker.general_config_tracker)


def _git_revision() -> str | None:
    """Return what lm-eval records of the working folder, without git's complaint if it is none."""
    try:
        command = ["git", "describe", "--always"]
        result = subprocess.run(command, capture_output=True, text=True)
    except OSError:  # there is no git
        return None
    return result.stdout.strip() or None


def _default_device() -> str:
    """Return the best available device; lm-eval would default to CUDA even without a GPU."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
