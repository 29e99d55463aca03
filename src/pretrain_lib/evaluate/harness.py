"""Scores of a model folder: lm-eval-harness's own model, requests and metrics, nothing added.

Floor 1.
"""

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain_lib.data.shards import write_atomically

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

DTYPES = ("float32", "bfloat16", "float16", "auto")
BOOTSTRAP_DRAWS = 1000  # lm-eval's 100,000 take minutes and change the third digit of an error bar


def evaluate_folder(
    folder: Path,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    dtype: str = "float32",
    device: str | None = None,
    num_fewshot: int | None = None,
    log_samples: bool = False,
) -> dict:
    """Run lm-eval on an exported Hugging Face folder and return its own results.

    `tasks` are names or patterns of lm-eval's tasks, or of the YAML files below `include_path`,
    whose Python is executed: trust them. The first `limit` items of each task are scored; the
    generators of random numbers are left as they were. Raises ValueError for a folder without a
    model, an unknown task, or a data set that cannot be reached.
    """
    _check_folder(folder)
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype} must be one of {', '.join(DTYPES)}")
    manager, names = find_tasks(tasks, include_path=include_path)
    with keep_random_state():
        _load_data(manager, names)
        return _run(
            manager,
            names,
            model_args={
                "pretrained": str(folder),
                "dtype": dtype,
                # In bfloat16 a score of -140 has no digit after the point.
                "softmax_dtype": "float32",
                "use_safetensors": True,
            },
            num_fewshot=num_fewshot,
            batch_size=batch_size,
            device=device or _default_device(),
            limit=limit,
            log_samples=log_samples,
        )


@contextlib.contextmanager
def keep_random_state() -> Iterator[None]:
    """Put Python's generator back afterwards: lm-eval draws from it whenever it names a task.

    NumPy's and torch's it leaves alone, unless told to seed them.
    """
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def find_tasks(
    tasks: Sequence[str], *, include_path: Path | None = None
) -> tuple["TaskManager", list[str]]:
    """Return lm-eval's task manager and the names that `tasks` (names or patterns) stand for.

    lm-eval's own thousands of tasks take seconds to index, so that waits until one is asked for.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None:
        if not include_path.is_dir():
            raise ValueError(f"include_path={include_path} is not a folder of task files (.yaml)")
        manager = TaskManager(include_path=str(include_path), include_defaults=False)
        # A group may list tasks that come with lm-eval: only single tasks are known to be whole.
        found = [manager.match_tasks([task]) for task in tasks]
        if tasks and all(names and set(names) <= set(manager.all_subtasks) for names in found):
            return manager, _flatten(found)
    manager = TaskManager(include_path=str(include_path) if include_path else None)
    found = [manager.match_tasks([task]) for task in tasks]
    missing = [task for task, names in zip(tasks, found, strict=True) if not names]
    if missing or not tasks:
        raise ValueError(
            f"tasks={','.join(missing) or 'none'} is known neither to lm-eval nor below "
            f"include_path={include_path}; `lm-eval ls tasks` lists lm-eval's own, and a folder of "
            f"your own task files is given as include_path"
        )
    return manager, _flatten(found)


def write_results(results: dict, path: Path) -> None:
    """Write results as lm-eval's CLI does: one JSON, and `samples_TASK.jsonl` beside it.

    The latter only where the results hold samples; log-likelihoods in it are strings, as there.
    """
    from lm_eval.utils import handle_non_serializable, hash_string

    samples = results.get("samples", {})
    kept = {key: value for key, value in results.items() if key != "samples"}
    kept["task_hashes"] = {
        task: hash_string(
            "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in rows)
        )
        for task, rows in samples.items()
    }
    text = json.dumps(kept, indent=2, default=handle_non_serializable, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    for task, rows in samples.items():
        lines = [
            json.dumps(_plain_sample(row), default=handle_non_serializable, ensure_ascii=False)
            for row in rows
        ]
        write_atomically(
            path.with_name(f"samples_{task}.jsonl"), ("\n".join(lines) + "\n").encode()
        )


def format_table(results: dict) -> str:
    """Return the scores as an aligned table: task, metric, value, stderr (empty if not known)."""
    rows = [("task", "metric", "value", "stderr")]
    for task, scores in (results["results"] | results.get("groups", {})).items():
        for key, value in scores.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric} ({kind})"
            rows.append((task, label, _number(value), _number(error)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{task:<{widths[0]}}  {metric:<{widths[1]}}  {value:>{widths[2]}}  {error:>{widths[3]}}"
        for task, metric, value, error in rows
    )


def _check_folder(folder: Path) -> None:
    """Refuse what transformers would take for the name of a model on the hub."""
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} is not a model folder: it has no config.json; give a checkpoint "
            f"(RUN/checkpoints/step-...) or what `pretrain export` wrote"
        )


def _run(manager: "TaskManager", names: list[str], **options: object) -> dict:
    """Run lm-eval and return its results with what its CLI notes beside them."""
    import lm_eval
    from lm_eval.loggers import EvaluationTracker

    tracker = EvaluationTracker()
    results = lm_eval.simple_evaluate(
        model="hf",
        tasks=names,
        task_manager=manager,
        evaluation_tracker=tracker,
        bootstrap_iters=BOOTSTRAP_DRAWS,
        random_seed=None,
        numpy_random_seed=None,
        torch_random_seed=None,
        **options,
    )
    tracker.general_config_tracker.log_end_time()
    return results | asdict(tracker.general_config_tracker)


def _load_data(manager: "TaskManager", names: list[str]) -> None:
    """Fetch the tasks' data before the model is loaded: what is out of reach shows at once."""
    try:
        manager.load(names)
    except ConnectionError as error:
        raise ValueError(
            f"tasks={','.join(names)}: a data set is not in the cache and the hub cannot be "
            f"reached ({error}); fetch it once on a machine with a network, or give task files "
            f"whose data_files are local as include_path"
        ) from error


def _default_device() -> str:
    """Return the device that lm-eval, left alone, takes to be CUDA even where there is none."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _flatten(found: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in found for name in names))


def _plain_sample(row: dict) -> dict:
    """Return a sample in the types that lm-eval's CLI writes, which `datasets` can load."""
    from lm_eval.utils import sanitize_list

    arguments = {
        f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(argument)}
        for i, argument in enumerate(row["arguments"])
    }
    return row | {
        "arguments": arguments,
        "resps": sanitize_list(row["resps"]),
        "filtered_resps": sanitize_list(row["filtered_resps"]),
        "target": str(row["target"]),
    }


def _number(value: float | str | None) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""
