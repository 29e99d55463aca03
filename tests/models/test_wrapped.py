"""A model in the wrappers of torch.compile and DDP is the model inside, for every entry."""

from pathlib import Path

import pytest
import torch
from torch.nn.parallel import DataParallel, DistributedDataParallel
from transformers import AutoModelForCausalLM

import pretrain_lib as pl
from pretrain_lib.models.interface import unwrap
from pretrain_lib.models.llama import LlamaConfig
from tests.conftest import change
from tests.families import family

SHAPE = {"vocabulary_size": 61, "context_length": 32, "num_layers": 2, "num_heads": 2, "width": 16}
MODELS = {
    "gpt2": lambda: pl.GPT2(pl.GPT2Config(**SHAPE)).initialize(0),
    "llama": lambda: pl.Llama(LlamaConfig(**SHAPE, num_key_value_heads=2, mlp_width=32)).initialize(
        0
    ),
    "adapter": lambda: pl.build_model(family("olmo2")).initialize(0),
}


@pytest.fixture
def one_process(tmp_path):
    """A process group of this process alone, for DDP."""
    address = f"file://{tmp_path / 'rendezvous'}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


WRAPPERS = {
    "compiled": torch.compile,
    "ddp": DistributedDataParallel,
    "data parallel": DataParallel,
    "compiled ddp": lambda model: torch.compile(DistributedDataParallel(model)),
    "ddp of compiled": lambda model: DistributedDataParallel(torch.compile(model)),
}


@pytest.fixture(params=WRAPPERS)
def wrap(request, one_process):
    return WRAPPERS[request.param]


@pytest.mark.parametrize("name", MODELS)
def test_what_is_saved_is_the_model_inside(name, wrap, tmp_path):
    model = MODELS[name]()
    wrapped = wrap(model)
    pl.save_pretrained(wrapped, tmp_path / "saved", tokenizer=None)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model.eval()(ids), rtol=1e-4, atol=1e-5)
    optimizer = pl.build_adamw(model, learning_rate=1e-3)
    options = {"tokenizer": None, "manifest": {}}
    saved = pl.save_checkpoint(tmp_path, pl.TrainingState(step=1), wrapped, optimizer, **options)
    other = MODELS[name]()
    for parameter in other.parameters():
        parameter.data.zero_()
    pl.load_checkpoint(saved, wrap(other), pl.build_adamw(other, learning_rate=1e-3))
    for one, loaded in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, loaded)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_generated_is_that_of_the_model_inside(name, wrap):
    model = MODELS[name]().eval()
    options = {"new_tokens": 5, "context_length": 32, "temperature": 0.0}
    prompts = [[1, 2, 3], [4, 5]]
    assert pl.generate(wrap(model), prompts, **options) == pl.generate(model, prompts, **options)


def test_a_compiled_model_is_trained_and_its_checkpoint_is_read(recipe):
    model = torch.compile(pl.build_model(recipe.model).initialize(0))
    recipe = change(recipe, schedule={"tokens": 2 * 256}, samples={"every": 100})
    pl.train(recipe, model, pl.open_corpus(recipe), pl.start_accelerator(recipe))
    pl.load_pretrained(pl.find_newest(Path(recipe.run.dir, "checkpoints")))


def test_other_modules_are_refused_in_one_line(tmp_path):
    model = MODELS["gpt2"]()
    optimizer = pl.build_adamw(model, learning_rate=1e-3)
    other = torch.nn.Linear(2, 2)
    options = {"tokenizer": None, "manifest": {}}
    for act in (
        lambda m: pl.save_pretrained(m, tmp_path / "new", tokenizer=None),
        lambda m: pl.save_checkpoint(tmp_path / "new", pl.TrainingState(), m, optimizer, **options),
        lambda m: pl.generate(m, [[1]], new_tokens=1, context_length=8),
        unwrap,
    ):
        with pytest.raises(ValueError, match=r"takes GPT2, .*, not Linear \(it has no config.*\)$"):
            act(other)
    model.blocks[1] = torch.compile(model.blocks[1])
    with pytest.raises(ValueError, match=r"^transformer\.h\.1 is wrapped by torch\.compile, .*$"):
        pl.save_pretrained(model, tmp_path / "new", tokenizer=None)
    assert not (tmp_path / "new").exists()
