"""Find lm-eval tasks by name and download their data before training starts."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from accelerate import Accelerator

from pretrain_lib.config.settings import Recipe
from pretrain_lib.corpus.paths import Corpus
from pretrain_lib.distributed.launched import on_main
from pretrain_lib.quiet import without_foreign_progress
from pretrain_lib.values import show
from pretrain_lib.wording import in_line

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


LONGEST = 300  # characters of a foreign error that are shown
NO_TASKS = ", or score none with --scores.tasks '[]'"


@dataclass(frozen=True)
class Tasks:
    """Tasks whose data is available locally."""

    manager: "TaskManager"
    names: list[str]


def open_tasks(
    tasks: Sequence[str], *, include_path: Path | str | None = None, section: str = ""
) -> Tasks:
    """Find tasks (names or patterns) and download their data.

    Tasks come from lm-eval or from YAML files below `include_path`; the Python code in these is
    executed, so they must be trusted. The first item of each is made a request, so that a task that
    cannot be scored is found before hours of training. Raises ValueError for an unknown task, one
    that lm-eval cannot read, or data that is not available.
    """
    manager, names = find_tasks(tasks, include_path=include_path, section=section)
    try:
        with _reading(names, section):
            for task in manager.load(names)["tasks"].values():
                task.set_fewshot_seed(0)
                task.build_all_requests(limit=1)
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"{section}tasks={','.join(names)}: the data is neither in the cache nor in a local "
            f"file, and the Hugging Face Hub cannot be reached ({error}); download it once on a "
            f"machine with a network, set {section}include_path to task files whose data_files are "
            f"local{NO_TASKS if section else ''}"
        ) from error
    return Tasks(manager, names)


@contextmanager
def _reading(tasks: Sequence[str], section: str) -> Iterator[None]:
    """Raise ValueError in one line for what fails in lm-eval, but for data out of reach."""
    try:
        yield
    except (ConnectionError, FileNotFoundError):
        raise
    except Exception as error:  # of lm-eval, datasets, jinja, or the code of a task
        reason = in_line(f"{type(error).__name__}: {error}")[:LONGEST]
        raise ValueError(
            f"{section}tasks={','.join(tasks)} cannot be read by lm-eval ({reason}); mend their "
            f"files below {section}include_path{NO_TASKS if section else ''}"
        ) from error


def open_scored_tasks(config: Recipe, corpus: Corpus, accelerator: Accelerator) -> Tasks | None:
    """Return the tasks of `config.scores` on the main process; None on the others.

    Raises ValueError on all processes if a task is unknown, its data is not available, or the data
    of the run has no tokenizer.
    """
    if not config.scores.tasks:
        return None
    if corpus.tokenizer is None:
        raise ValueError(
            f"scores.tasks={config.scores.tasks}: the data has no tokenizer; set data.tokenizer, "
            f"or give no tasks (--scores.tasks [])"
        )
    opened: list[Tasks] = []

    def fetch() -> None:
        with without_foreign_progress():
            include_path = _include_path(config)
            opened.append(
                open_tasks(config.scores.tasks, include_path=include_path, section="scores.")
            )

    on_main(accelerator, fetch)
    return opened[0] if opened else None


def check_task_names(config: Recipe) -> None:
    """Raise ValueError if `config.scores` names an unknown task."""
    if config.scores.tasks:
        include_path = _include_path(config)
        find_tasks(config.scores.tasks, include_path=include_path, section="scores.")


def _include_path(config: Recipe) -> Path | None:
    return config.scores.include_path and Path(config.scores.include_path)


def find_tasks(
    tasks: Sequence[str], *, include_path: Path | str | None = None, section: str = ""
) -> tuple["TaskManager", list[str]]:
    """Return lm-eval's task manager and the task names that match `tasks` (names or patterns).

    Indexing the thousands of tasks of lm-eval takes seconds, so it is done only if `include_path`
    does not have all of them. `section` is put before the names of settings in messages. Raises
    ValueError for an unknown task.
    """
    if isinstance(tasks, str):
        raise ValueError(f"{section}tasks={show(tasks)} must be a list, such as [{show(tasks)}]")
    include_path = None if include_path is None else Path(include_path)
    if include_path is not None and not include_path.is_dir():
        raise ValueError(
            f"{section}include_path={include_path} is not a folder of task files (.yaml)"
        )

    from lm_eval.tasks import TaskManager  # takes seconds

    if include_path is not None:
        with _reading(tasks, section):
            manager = TaskManager(include_path=str(include_path), include_defaults=False)
            matches = [manager.match_tasks([task]) for task in tasks]
        # A group may include tasks of lm-eval, so only single tasks can do without the index.
        if tasks and all(names and set(names) <= set(manager.all_subtasks) for names in matches):
            return manager, _flatten(matches)
    with _reading(tasks, section):
        manager = _all_of_lm_eval(include_path)
        matches = [manager.match_tasks([task]) for task in tasks]
    missing = [task for task, names in zip(tasks, matches, strict=True) if not names]
    if missing or not tasks:
        unknown = f"not known to lm-eval, and there is no {section}include_path"
        if include_path is not None:
            unknown = f"known neither to lm-eval nor below {section}include_path={include_path}"
        raise ValueError(
            f"{section}tasks={','.join(missing) or 'none'} is {unknown}; `lm-eval ls tasks` lists "
            f"the tasks of lm-eval, and {section}include_path may name a folder of your own task "
            f"files" + "".join(f"; {problem}" for problem in _broken_files(include_path))
        )
    return manager, _flatten(matches)


def _broken_files(include_path: Path | None) -> list[str]:
    """Return what is wrong with the task files of a folder that are no YAML: lm-eval skips them."""
    problems = []
    for path in sorted(include_path.rglob("*.yaml")) if include_path else ():
        try:
            yaml.compose(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
            problems.append(f"{path} is no YAML: {in_line(error)[:LONGEST]}")
    return problems


@functools.cache
def _all_of_lm_eval(include_path: Path | None) -> "TaskManager":
    """Return the task manager of all tasks of lm-eval, and of those below `include_path`."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include_path) if include_path else None)


def _flatten(found: list[list[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in found for name in names))
