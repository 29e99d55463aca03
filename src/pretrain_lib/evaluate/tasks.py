"""Tasks of lm-eval: found by name, their data fetched before anything waits for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

from pretrain_lib.config.settings import Recipe
from pretrain_lib.corpus.paths import Corpus
from pretrain_lib.distributed.launched import on_main
from pretrain_lib.quiet import without_foreign_progress

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data is here."""

    manager: "TaskManager"
    names: list[str]


def open_tasks(tasks: Sequence[str], *, include_path: Path | None = None) -> Tasks:
    """Find tasks (names or patterns) and fetch their data, so that what is out of reach shows.

    They are lm-eval's own, or those of the YAML files below `include_path`, whose Python is
    executed: trust them. Raises ValueError for an unknown task, or data that cannot be reached.
    """
    manager, names = find_tasks(tasks, include_path=include_path)
    try:
        manager.load(names)
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"tasks={','.join(names)}: data is neither in the cache nor in a file, and the hub "
            f"cannot be reached ({error}); fetch it once on a machine with a network, or give task "
            f"files whose data_files are local as include_path"
        ) from error
    return Tasks(manager, names)


def open_scored_tasks(config: Recipe, corpus: Corpus, accelerator: Accelerator) -> Tasks | None:
    """Return what a recipe's model will be scored on, on the main process; None elsewhere.

    Raises ValueError on all of them if it cannot be had.
    """
    if not config.scores.tasks:
        return None
    if corpus.tokenizer is None:
        raise ValueError(
            f"scores.tasks={config.scores.tasks}: the data came without a tokenizer; give it as "
            f"data.tokenizer, or no tasks (--scores.tasks [])"
        )
    opened: list[Tasks] = []

    def fetch() -> None:
        with without_foreign_progress():
            opened.append(open_tasks(config.scores.tasks, include_path=_include_path(config)))

    on_main(accelerator, fetch)
    return opened[0] if opened else None


def check_task_names(config: Recipe) -> None:
    """Raise ValueError for a task that a recipe names and nobody knows."""
    if config.scores.tasks:
        options = {"include_path": _include_path(config), "section": "scores."}
        find_tasks(config.scores.tasks, **options)


def _include_path(config: Recipe) -> Path | None:
    return config.scores.include_path and Path(config.scores.include_path)


def find_tasks(
    tasks: Sequence[str], *, include_path: Path | None = None, section: str = ""
) -> tuple["TaskManager", list[str]]:
    """Return lm-eval's task manager and the names that `tasks` (names or patterns) stand for.

    lm-eval's own thousands of tasks take seconds to index, so that waits until one is asked for.
    `section` stands before the names of settings in messages. Raises ValueError for an unknown
    task.
    """
    if include_path is not None and not include_path.is_dir():
        raise ValueError(
            f"{section}include_path={include_path} is not a folder of task files (.yaml)"
        )

    from lm_eval.tasks import TaskManager  # takes seconds

    if include_path is not None:
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
            f"{section}tasks={','.join(missing) or 'none'} is known neither to lm-eval nor below "
            f"{section}include_path={include_path}; `lm-eval ls tasks` lists lm-eval's own, and a "
            f"folder of your own task files is given as include_path"
        )
    return manager, _flatten(found)


def _flatten(found: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in found for name in names))
