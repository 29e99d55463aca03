"""float8 training by Accelerate's recipe for torchao, which emulates it on a CPU."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pretrain_lib.distributed.float8 import float8_recipe
from pretrain_lib.models.llama import LlamaConfig
from tests.conftest import ROOT, python_path, read_rows, run_command, tiny_flags

TINY = LlamaConfig(
    vocabulary_size=512,
    context_length=32,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
    width=32,
    mlp_width=64,
)
MATRICES = 7  # of a layer
GRADIENTS = """
import json, sys
from dataclasses import replace
from pathlib import Path
import torch
from torch import nn
from pretrain_lib import start_accelerator
from pretrain_lib.models.llama import Llama
from pretrain_lib.training.placement import place
from tests.conftest import small_recipe
from tests.distributed.test_float8 import TINY

recipe = replace(small_recipe(Path("none"), Path(sys.argv[1])), model=TINY)
ids = torch.randint(0, 512, (4, 32), generator=torch.Generator().manual_seed(0))
gradients = {}
for precision in ("fp32", "fp8"):
    model = Llama(TINY).initialize(0)
    if precision == "fp8":
        model, _ = place(recipe, model, start_accelerator(recipe))
    model(ids, ids)[0].backward()
    gradients[precision] = {name: p.grad for name, p in model.named_parameters()}
kinds = {name: type(m).__name__ for name, m in model.named_modules() if isinstance(m, nn.Linear)}
errors = {
    name: float((gradients["fp8"][name] - exact).norm() / exact.norm())
    for name, exact in gradients["fp32"].items()
}
print(json.dumps({"kinds": kinds, "errors": errors}))
"""


@pytest.fixture(scope="module")
def torchao(tmp_path_factory):
    """The variables under which a process on the CPU trains in float8 by torchao."""
    target = tmp_path_factory.mktemp("torchao")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile"]
    installed = run_command(*pip, "--target", target, "torchao>=0.15")
    assert installed.returncode == 0, installed.stderr
    launched = {"ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_USE_CPU": "true"}
    return {"PYTHONPATH": python_path(ROOT, target), "OMP_NUM_THREADS": "1", **launched}


def test_what_does_not_fit_is_refused_by_name(recipe, monkeypatch):
    def refusal(model):
        with pytest.raises(ValueError, match="fp8") as error:
            float8_recipe(replace(recipe, model=model), cpu=True)
        return str(error.value)

    assert "is for LLaMA and Qwen3" in refusal(recipe.model)
    assert "model.mlp_width=72" in refusal(replace(TINY, mlp_width=72))
    assert "all key and value heads=8" in refusal(replace(TINY, num_heads=4, num_key_value_heads=1))
    assert "pip install 'pretrain_lib[fp8]'" in refusal(TINY)
    monkeypatch.setenv("ACCELERATE_FP8_BACKEND", "TE")
    assert "fp8_backend=te is not supported" in refusal(TINY)


@pytest.mark.slow
def test_the_matrices_of_the_blocks_and_nothing_else_compute_in_float8(torchao, tmp_path):
    result = run_command(sys.executable, "-c", GRADIENTS, tmp_path, environment=torchao)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    low = {name for name, kind in found["kinds"].items() if kind == "Float8Linear"}
    assert low == set(found["kinds"]) - {"lm_head"}
    assert len(low) == MATRICES * TINY.num_layers
    # Three bits of mantissa round by 2^-4 at most; bf16, which the head has, by 2^-8.
    assert all(2**-8 < found["errors"][f"{name}.weight"] < 2**-3 for name in low)


@pytest.mark.slow
def test_a_run_in_float8_learns_resumes_and_saves_what_one_in_fp32_does(
    torchao, prepared, tmp_path
):
    def train(name, *flags, **environment):
        shared = tiny_flags(prepared, tmp_path / name)
        own = ["--model.num_key_value_heads", "1", "--model.mlp_width", "64"]
        own += ["--optimizer.learning_rate", "1e-2"]
        result = run_command(
            *(sys.executable, "recipes/llama_1_3b.py", *shared, *own, *flags),
            environment=torchao | environment,
        )
        assert result.returncode in (0, 75), result.stderr
        return result.stdout

    def rows(name):
        return [row for row in read_rows(tmp_path / name) if row["kind"] == "train"]

    def weights(name):
        (path,) = Path(tmp_path, name, "checkpoints").glob("step-*8/model.safetensors")
        return load_file(path)

    said = train("whole")
    assert "float8 products in the blocks" in said and "it is emulated" in said
    train("exact", ACCELERATE_MIXED_PRECISION="no")
    low, exact = ([row["loss"] for row in rows(name)] for name in ("whole", "exact"))
    assert low == pytest.approx(exact, rel=0.01) and low != exact
    assert low[-1] < low[0] - 0.3
    shapes = [{k: (v.dtype, v.shape) for k, v in weights(n).items()} for n in ("whole", "exact")]
    assert shapes[0] == shapes[1]

    train("halves", "--run.max_steps", "5")
    train("halves", "--run.max_steps", "8")
    assert rows("halves") == rows("whole")
    assert all(weights("halves")[name].equal(own) for name, own in weights("whole").items())
