"""The checkpoint from which a run starts, and what a start leaves of the others."""

import json
from pathlib import Path

import pytest

from pretrain_lib.checkpoint.folders import FILES, STATE, describe_files
from pretrain_lib.training.checkpoint_choice import choose_checkpoint
from tests.conftest import change
from tests.training.test_loop import checkpoints, run

pytestmark = pytest.mark.moderate


@pytest.fixture
def newest(recipe):
    """The last checkpoint of a run that has kept those of steps 3, 6 and 8."""
    run(recipe)
    return Path(recipe.run.dir, "checkpoints", "step-00000008")


def test_one_whose_replacement_was_interrupted_is_put_back(recipe, newest):
    newest.rename(newest.with_name(f".{newest.name}.old"))
    assert choose_checkpoint(recipe) == (newest, False)
    assert newest.is_dir()


def test_the_best_is_kept(recipe, newest):
    state = json.loads((newest / STATE).read_text())
    (newest / STATE).write_text(json.dumps(state | {"best_step": 3}))
    (newest / FILES).write_text(json.dumps(describe_files(newest)))
    kept = change(recipe, checkpoint={"keep_last": 1, "keep_best": "loss"})
    assert choose_checkpoint(kept) == (newest, False)
    assert checkpoints(recipe) == ["step-00000003", "step-00000008"]


def test_a_damaged_one_is_passed_over_and_left_there(recipe, newest):
    (newest / "config.json").write_text("{}")
    with pytest.warns(UserWarning, match="damaged"):
        path, _ = choose_checkpoint(recipe)
    assert path.name == "step-00000006"
    assert checkpoints(recipe)[1:] == ["step-00000006", "step-00000008"]
