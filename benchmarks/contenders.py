"""Training steps of ours and of the peers: the same work, each built as its own script builds it.

`Trial` says what a child process is to run, `run_trial` runs it. Peers are imported from checkouts
that the caller names; nothing of theirs is kept here.
"""

import importlib
import os
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from measuring import forget_peak, peak_resident_mb, resident_mb

from pretrain_lib.models.flops import measured_matrix_rate
from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.llama import Llama, LlamaConfig
from pretrain_lib.optim.groups import build_adamw

# Ours with options: a name, and the settings of the recipe (section.field) that it changes.
# `ours.build` puts them to use.
OURS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours lean": {"system.activation_checkpointing": "selective"},
    "ours leanest": {"system.activation_checkpointing": "full", "optimizer.moments": "bf16"},
    "ours compiled": {"system.compile": True},
}

COMPILED = " compiled"  # behind a peer's name: through torch.compile
LEARNING_RATE, CLIP = 1e-4, 1.0
FAMILIES = {"gpt2": (GPT2, GPT2Config), "llama": (Llama, LlamaConfig)}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Step = Callable[[torch.Tensor, torch.Tensor], float]  # input and targets (B, T) to the loss
Loss = Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Trial:
    """What one process runs."""

    contender: str
    family: str
    dtype: str
    batch: int
    length: int
    shape: dict[str, int] = field(default_factory=dict)
    """Fields of our configuration of the model that differ from its defaults."""
    documents: int = 0
    """In each window, kept apart, of about the same length; 0: one text, as the peers have it."""
    warmup: int = 2
    steps: int = 3
    paths: dict[str, str] = field(default_factory=dict)
    """The checkout of each peer that has one."""

    @property
    def config(self) -> GPT2Config | LlamaConfig:
        """Our configuration of the model."""
        return FAMILIES[self.family][1](**self.shape)

    @property
    def is_ours(self) -> bool:
        """Whether it is one of ours."""
        return self.contender in OURS


def device() -> torch.device:
    """Return where to measure."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_trial(trial: Trial) -> dict[str, Any]:
    """Make the steps of a trial, in this process, and return what they took."""
    where = device()
    # As our engine and nanoGPT's script set it.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    import_contender(trial)
    imported = resident_mb()
    torch.manual_seed(0)
    step = sys.modules["ours"].build(trial) if trial.is_ours else build_peer(trial)
    rows = trial.batch, trial.length + 1
    seconds = []
    for _ in range(trial.warmup + trial.steps):
        ids = torch.randint(trial.config.vocabulary_size, rows).to(where)
        started = time.perf_counter()
        loss = step(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())  # waits for the device
        seconds.append(time.perf_counter() - started)
    return {
        "warmup_seconds": seconds[: trial.warmup],
        "seconds": seconds[trial.warmup :],
        "peak_mb": peak_memory(where),
        "imported_mb": imported,
        "loss": loss,
        "matrix_rate": measured_matrix_rate(where, DTYPES[trial.dtype]),
        "device": torch.cuda.get_device_name() if where.type == "cuda" else "cpu",
    }


def start_memory(where: torch.device) -> float:
    """Return the memory in use in MB, and let the peak begin there."""
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 1e6
    forget_peak()
    return resident_mb()


def peak_memory(where: torch.device) -> float:
    """Return the highest use of memory in MB since `start_memory`."""
    on_gpu = where.type == "cuda"
    return torch.cuda.max_memory_allocated() / 1e6 if on_gpu else peak_resident_mb()


def measure_calls(call: Callable[[], None], where: torch.device, calls: int) -> dict[str, float]:
    """Return the median seconds of a call after a first, and the MB by which memory grows most."""
    before, seconds = start_memory(where), []
    for _ in range(1 + calls):
        started = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - started)
    return {"seconds": median(seconds[1:]), "peak_mb": peak_memory(where) - before}


# Peers


def build_peer(trial: Trial) -> Step:
    """Return the step of a plain loop around a peer's model: masters in fp32, bf16 by autocast."""
    where = device()
    with where:  # weights are drawn where they are needed
        model, loss_of = PEERS[peer_name(trial.contender)].build(trial)
    model.to(where).train()
    optimizer = build_adamw(model, learning_rate=LEARNING_RATE)  # fused, also on the CPU
    called = torch.compile(model) if trial.contender.endswith(COMPILED) else model
    low = trial.dtype == "bf16"

    def step(ids: torch.Tensor, targets: torch.Tensor) -> float:
        with torch.autocast(where.type, torch.bfloat16, enabled=low):
            loss = loss_of(called, ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def build_nanogpt(trial: Trial) -> tuple[torch.nn.Module, Loss]:
    """Return nanoGPT's GPT-2, with the biases that GPT-2 has."""
    module, c = sys.modules["model"], trial.config
    sizes = {"n_layer": c.num_layers, "n_head": c.num_heads, "n_embd": c.width}
    rows = c.padded_vocabulary_size  # 50,304 for GPT-2, as is its own default
    config = module.GPTConfig(block_size=c.context_length, vocab_size=rows, bias=True, **sizes)
    return module.GPT(config), lambda model, ids, targets: model(ids, targets)[1]


def build_llmc(trial: Trial) -> tuple[torch.nn.Module, Loss]:
    """Return the GPT-2 of llm.c's PyTorch trainer, as with its --flash=1."""
    module, c = sys.modules["train_gpt2"], trial.config
    module.FLASH = 1
    sizes = {"n_layer": c.num_layers, "n_head": c.num_heads, "n_embd": c.width}
    config = module.GPTConfig(c.context_length, c.vocabulary_size, **sizes)
    return module.GPT(config), lambda model, *batch: model(*batch, return_logits=False)[1]


def build_litgpt(trial: Trial) -> tuple[torch.nn.Module, Loss]:
    """Return litgpt's model in the shape of our LLaMA, with the loss of its `pretrain`."""
    litgpt, c = sys.modules["litgpt"], trial.config
    config = litgpt.Config(
        block_size=c.context_length,
        vocab_size=c.vocabulary_size,
        padded_vocab_size=c.padded_vocabulary_size,
        n_layer=c.num_layers,
        n_head=c.num_heads,
        n_query_groups=c.num_key_value_heads,
        n_embd=c.width,
        intermediate_size=c.mlp_width,
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=c.norm_epsilon,
        mlp_class_name="LLaMAMLP",
    )
    loss_of = importlib.import_module("litgpt.utils").chunked_cross_entropy
    return litgpt.GPT(config), lambda model, ids, targets: loss_of(model(ids), targets)


def build_transformers(trial: Trial) -> tuple[torch.nn.Module, Loss]:
    """Return transformers' model with SDPA; its loss shifts the labels itself."""
    transformers, c = sys.modules["transformers"], trial.config
    options = {"vocab_size": c.vocabulary_size, "use_cache": False, "attn_implementation": "sdpa"}
    if trial.family == "gpt2":
        sizes = {"n_layer": c.num_layers, "n_head": c.num_heads, "n_embd": c.width}
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        options |= sizes | dropouts | {"n_positions": c.context_length}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**options))
    else:
        options |= {
            "hidden_size": c.width,
            "intermediate_size": c.mlp_width,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_key_value_heads,
            "max_position_embeddings": c.context_length,
            "rms_norm_eps": c.norm_epsilon,
            "tie_word_embeddings": c.tied_head,
        }
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
    return model, lambda model, ids, _: model(input_ids=ids, labels=ids).loss


@dataclass(frozen=True)
class Peer:
    """What a contender is made of."""

    families: tuple[str, ...]
    build: Callable[[Trial], tuple[torch.nn.Module, Loss]]
    modules: tuple[str, ...]


PEERS = {
    "transformers": Peer(
        ("gpt2", "llama"),
        build_transformers,
        ("transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama"),
    ),
    "nanoGPT": Peer(("gpt2",), build_nanogpt, ("model",)),
    "llm.c": Peer(("gpt2",), build_llmc, ("train_gpt2",)),
    "litgpt": Peer(("llama",), build_litgpt, ("litgpt", "litgpt.utils")),
}


def peer_name(contender: str) -> str:
    """Return the name of a peer, compiled or not."""
    return contender.removesuffix(COMPILED)


def import_contender(trial: Trial) -> None:
    """Import what a contender consists of, and nothing of the others."""
    name = peer_name(trial.contender)
    if name in trial.paths:
        sys.path.insert(0, trial.paths[name])
    for module in ("ours",) if trial.is_ours else PEERS[name].modules:
        importlib.import_module(module)


def add_path_flags(parser: ArgumentParser) -> None:
    """Add the flags that say where the peers' checkouts are."""
    for name in ("nanogpt", "litgpt", "llmc"):
        parser.add_argument(f"--{name}", metavar="PATH", help="its checkout, to measure it too")


def peer_paths(options: Namespace) -> dict[str, str]:
    """Return the checkouts that were given, by the names of the peers."""
    given = {"nanoGPT": options.nanogpt, "litgpt": options.litgpt, "llm.c": options.llmc}
    return {name: os.path.realpath(path) for name, path in given.items() if path}
