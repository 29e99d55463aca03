"""Task files of lm-eval, damaged at random (`inputs`)."""

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pretrain_lib.evaluate import tasks
from tests.faults.inputs import damaged, other_values, reads, tries

pytestmark = [pytest.mark.moderate, pytest.mark.filterwarnings("ignore")]
ROWS = "".join(json.dumps({"q": f"sun {n}", "c": ["a", "b"], "l": n % 2}) + "\n" for n in range(4))


@pytest.fixture
def task(tmp_path, monkeypatch):
    """A task of four items, with its data, in the working folder."""
    monkeypatch.chdir(tmp_path)  # where datasets looks for data if a task names none
    (tmp_path / "rows.jsonl").write_text(ROWS)
    return {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "rows.jsonl")}},
        "validation_split": "validation",
        "output_type": "multiple_choice",
        "doc_to_text": "q",
        "doc_to_choice": "c",
        "doc_to_target": "l",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


@pytest.fixture
def alone(monkeypatch):
    """Leave out the thousands of tasks of lm-eval, whose index takes seconds."""
    from lm_eval.tasks import TaskManager

    def index(include_path):
        return TaskManager(include_path=str(include_path), include_defaults=False)

    monkeypatch.setattr(tasks, "_all_of_lm_eval", index)


@tries(share=0.5)
@given(data=st.data())
def test_task_files(data, task, tmp_path, alone):
    values = json.loads(data.draw(other_values(json.dumps(task))))
    content = yaml.safe_dump(values).encode(errors="replace")
    content = data.draw(damaged(yaml.safe_dump(task).encode()) | st.just(content))
    (tmp_path / "mine.yaml").write_bytes(content)
    reads(lambda: tasks.open_tasks(["mine"], include_path=tmp_path))


def test_a_task_file_that_is_no_yaml_is_named(tmp_path, alone):
    (tmp_path / "mine.yaml").write_text("task: [mine\n")
    with pytest.raises(ValueError, match=r"known neither.*mine\.yaml is no YAML: .*line 2"):
        tasks.open_tasks(["mine"], include_path=tmp_path)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"doc_to_text": "{{ q | nothing }}"}, "No filter named 'nothing'"),
        ({"doc_to_choice": "{{ missing[0] }}"}, "missing"),
        ({"validation_split": "nothing"}, "nothing"),
        ({"output_type": "nothing"}, "invalid output_type 'nothing'"),
    ],
)
def test_a_task_that_cannot_be_scored_is_found_before_a_run(task, tmp_path, alone, changed, reason):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(task | changed))
    with pytest.raises(ValueError, match=rf"^tasks=mine cannot be read by lm-eval \(.*{reason}"):
        tasks.open_tasks(["mine"], include_path=tmp_path)
