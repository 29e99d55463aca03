"""Other programs that read an export: do they compute the same logits?

    python benchmarks/exports.py --write exports/tried
    OTHER_PYTHON benchmarks/exports.py --read exports/tried --program ctranslate2

The first writes a small GPT-2, LLaMA and Qwen3 with the logits of some ids. The second runs in an
environment that has the program, and needs nothing of this library there.
"""

import argparse
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np

FOUND, ROWS, LENGTH, SHAPE = "expected.npz", 3, 48, {"context_length": 64, "num_layers": 2}
LIMIT = 1e-4  # relative to the largest logit


def write(out: Path) -> None:
    """Write exports, each with a file of ids and logits."""
    import torch

    import pretrain_lib as pl
    from pretrain_lib.export.export import export_checkpoint

    text = Path(__file__).with_name("README.md").read_text(encoding="utf-8")
    tokenizer = pl.train_tokenizer([text], vocabulary_size=512)
    shape = SHAPE | {"vocabulary_size": tokenizer.vocabulary_size, "num_heads": 4, "width": 64}
    grouped = shape | {"num_key_value_heads": 2, "mlp_width": 96}
    configs = {
        "gpt2": pl.GPT2Config(**shape),
        "llama": pl.LlamaConfig(**grouped, rope_theta=500.0),
        "qwen3": pl.LlamaConfig(**grouped, qk_norm=True, tied_head=True),
    }
    ids = torch.randint(
        tokenizer.vocabulary_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)
    )
    for name, config in configs.items():
        model = pl.build_model(config).initialize(0).eval()
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            for parameter in model.parameters():
                parameter.mul_(3)
            pl.save_pretrained(model, Path(folder), tokenizer=tokenizer)
            export_checkpoint(Path(folder), out / name)
            np.savez(out / name / FOUND, ids=ids.numpy(), logits=model(ids).numpy())


def by_transformers(folder: Path, ids: np.ndarray, scratch: Path) -> np.ndarray:
    """Return the logits of transformers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.from_numpy(ids)).logits.float().numpy()


def by_ctranslate2(folder: Path, ids: np.ndarray, scratch: Path) -> np.ndarray:
    """Return the logits of CTranslate2, after its converter."""
    import ctranslate2
    from transformers import AutoTokenizer

    _call("ct2-transformers-converter", "--model", folder, "--output_dir", scratch / "model")
    tokens = [AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(row) for row in ids]
    generator = ctranslate2.Generator(str(scratch / "model"), device="cpu", compute_type="float32")
    return np.array(generator.forward_batch(tokens, return_log_probs=False))


def by_onnx(folder: Path, ids: np.ndarray, scratch: Path) -> np.ndarray:
    """Return the logits of ONNX Runtime, after optimum's export."""
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    task = ("--task", "text-generation-with-past")
    _call("optimum-cli", "export", "onnx", "--model", folder, *task, scratch / "model")
    model = ORTModelForCausalLM.from_pretrained(scratch / "model")
    tensor = torch.from_numpy(ids)
    return model(input_ids=tensor, attention_mask=torch.ones_like(tensor)).logits.numpy()


PROGRAMS = {
    "transformers": (by_transformers, ("transformers",)),
    "ctranslate2": (by_ctranslate2, ("ctranslate2", "transformers")),
    "onnx": (by_onnx, ("optimum-onnx", "onnxruntime", "transformers")),
}


def _call(command: str, *arguments: object) -> None:
    program = Path(sys.executable).with_name(command)
    subprocess.run([str(program), *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def read(out: Path, program: str) -> bool:
    """Print how far the logits of a program are from ours; return whether all are near."""
    function, packages = PROGRAMS[program]
    print(", ".join(f"{package} {metadata.version(package)}" for package in packages))
    near = True
    for folder in sorted(path.parent for path in out.glob(f"*/{FOUND}")):
        stored = np.load(folder / FOUND)
        try:
            with tempfile.TemporaryDirectory() as scratch:
                logits = function(folder, stored["ids"], Path(scratch))
        except Exception as error:  # whatever the program does not like
            print(f"{folder.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")
            near = False
            continue
        difference = float(np.abs(logits - stored["logits"]).max() / np.abs(stored["logits"]).max())
        print(f"{folder.name}: within {difference:.1e} of the largest logit")
        near = near and difference < LIMIT
    return near


def main() -> None:
    """Parse the flags and write, or read."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write exports to try")
    parser.add_argument("--read", type=Path, metavar="FOLDER", help="read them with --program")
    parser.add_argument("--program", choices=PROGRAMS, default="transformers")
    options = parser.parse_args()
    if options.write is not None:
        write(options.write)
    if options.read is not None:
        sys.exit(not read(options.read, options.program))


if __name__ == "__main__":
    main()
