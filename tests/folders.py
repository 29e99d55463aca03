"""Write model folders with transformers, and change what a folder may have been through.

    python tests/folders.py OUT

It needs torch and transformers only, so that the python of another version can write them too. Each
folder holds `changes.json`, which says how it differs from one that `save_pretrained` wrote.
"""

import itertools
import json
import random
import re
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file

SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
HEADS_OF_8 = SMALL | {"head_dim": 8}
GPT2 = {"vocab_size": 61, "n_positions": 64, "n_embd": 32, "n_head": 4, "n_layer": 2}
KINDS = {
    "gpt2": GPT2 | {"model_type": "gpt2"},
    "untied gpt2": GPT2 | {"model_type": "gpt2", "tie_word_embeddings": False},
    "llama": SMALL | {"model_type": "llama"},
    "tied llama": SMALL | {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3": HEADS_OF_8 | {"model_type": "qwen3", "tie_word_embeddings": True},
    "olmo2": SMALL | {"model_type": "olmo2"},
    "gemma3": HEADS_OF_8 | {"model_type": "gemma3_text", "query_pre_attn_scalar": 8},
    "qwen3_moe": HEADS_OF_8
    | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 16},
}
CHANGES = {
    "class": ("CausalLM", "SequenceClassification", "TokenClassification", "Model"),
    "layout": (
        "one file",
        "shards",
        "saved again over shards",
        "one file beside older shards",
        "shards, one of them missing",
    ),
    "dtype": ("float32", "bfloat16", "float16"),
    "head": ("as written", "stored beside the embedding", "another than the embedding"),
    "tied": ("as written", "the contrary", "not said"),
    "names": ("as written", "without prefix", "with another prefix"),
}
PLAIN = {kind: values[0] for kind, values in CHANGES.items()}
COMBINED = 10  # folders of each kind that differ in several ways


def each_change():
    """Yield no change, each change alone, and some of those that differ in several ways."""
    yield PLAIN
    for kind, values in CHANGES.items():
        yield from (PLAIN | {kind: value} for value in values[1:])
    several = [dict(zip(CHANGES, c, strict=True)) for c in itertools.product(*CHANGES.values())]
    several = [c for c in several if sum(c[kind] != PLAIN[kind] for kind in c) > 1]
    # Heads of classifiers and missing shards are refused, whatever else there is.
    several = [c for c in several if "Class" not in c["class"] and "missing" not in c["layout"]]
    yield from random.Random(0).sample(several, COMBINED)


def build(fields, head, *, seed):
    """Return a model with one of the heads of transformers, its weights at random."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(**fields)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    name = "AutoModel" if head == "Model" else f"AutoModelFor{head}"
    model = getattr(transformers, name).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def write_folder(folder, fields, changes):
    """Write a folder with `save_pretrained`, and change it; return whether there is such a head."""
    layout, dtype = changes["layout"], getattr(torch, changes["dtype"])
    try:
        model = build(fields, changes["class"], seed=0).to(dtype)
    except ValueError:
        return False
    older = {}
    if "older" in layout or "again" in layout:
        older_model = build(fields, changes["class"], seed=1).to(dtype)
        older_model.save_pretrained(folder, max_shard_size="20KB")
    if "older" in layout:
        older = {path: path.read_bytes() for path in folder.glob("model*")}
    size = "20KB" if layout.startswith("shards") else "1GB"
    model.save_pretrained(folder, max_shard_size=size)
    config = json.loads((folder / "config.json").read_text())
    if changes["tied"] == "not said":
        config.pop("tie_word_embeddings", None)
    if changes["tied"] == "the contrary":
        config["tie_word_embeddings"] = not model.config.tie_word_embeddings
    (folder / "config.json").write_text(json.dumps(config))
    for path in sorted(folder.glob("model*.safetensors")):
        tensors = change_tensors(load_file(path), changes)
        save_file(tensors, path, metadata={"format": "pt"})
    for path, content in older.items():  # transformers removes them; other programs do not
        path.write_bytes(content)
    if "missing" in layout:
        min(folder.glob("model-*.safetensors")).unlink()
    (folder / "changes.json").write_text(json.dumps(changes))
    return True


def change_tensors(tensors, changes):
    """Change the heads and names of the tensors of a file."""
    ends = ("wte.weight", "embed_tokens.weight")
    table = next((tensors[name] for name in tensors if name.endswith(ends)), None)
    if changes["head"] != "as written" and table is not None:
        factor = 1 if changes["head"] == "stored beside the embedding" else 3
        tensors["lm_head.weight"] = (table * factor).clone()
    if changes["names"] == "without prefix":
        prefix = re.compile("^(transformer|model)[.]")
        return {prefix.sub("", name): tensor for name, tensor in tensors.items()}
    if changes["names"] == "with another prefix":
        return {f"module.{name}": tensor for name, tensor in tensors.items()}
    return tensors


def write_folders(out, kind):
    """Write the folders of a kind, and return them."""
    folders = [out / kind / f"{number:03d}" for number, _ in enumerate(each_change())]
    return [
        folder
        for folder, changes in zip(folders, each_change(), strict=True)
        if write_folder(folder, KINDS[kind], changes)
    ]


if __name__ == "__main__":
    found = [write_folders(Path(sys.argv[1]), kind) for kind in KINDS]
    print(f"transformers {transformers.__version__}: {sum(map(len, found))} folders")
