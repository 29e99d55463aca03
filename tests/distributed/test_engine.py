"""The Accelerator as built, and the guards around it."""

import pytest
import torch
from accelerate import Accelerator

from pretrain_lib import start_accelerator
from pretrain_lib.distributed.engine import choose_precision
from pretrain_lib.distributed.guards import check_world
from tests.conftest import change


def test_precision_follows_the_launcher_and_the_device(recipe, monkeypatch):
    fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    precision, remark = choose_precision("no", False)
    assert precision == "no"
    assert (remark is not None) == fast  # slower than it could be, which is said
    precision, remark = choose_precision("bf16", False)
    assert precision == ("bf16" if fast else "no")
    assert (remark is None) == fast
    with pytest.raises(ValueError, match="mixed_precision=fp16"):
        choose_precision("fp16", False)


def test_a_world_other_than_asked_for_is_refused(recipe):
    accelerator = Accelerator(cpu=True)
    check_world(accelerator, launched=1, expected=1)
    with pytest.raises(ValueError, match="system.processes=8 but 1 run"):
        check_world(accelerator, launched=1, expected=8)
    with pytest.raises(ValueError, match="2 processes were started but Accelerate runs 1"):
        check_world(accelerator, launched=2, expected=None)


def test_a_world_other_than_expected_is_refused_at_the_start(recipe):
    with pytest.raises(ValueError, match="system.processes=3"):
        start_accelerator(change(recipe, system={"processes": 3}))


def test_accumulation_is_left_to_the_step(recipe, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = start_accelerator(recipe)
    assert accelerator.gradient_accumulation_steps == 1
    assert not accelerator.gradient_state.sync_with_dataloader
