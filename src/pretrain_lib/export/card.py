"""The model card of an export, with only the facts known from the checkpoint and its run."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pretrain_lib.checkpoint.folders import MANIFEST, STATE
from pretrain_lib.corpus.origin import Origin, find_origins
from pretrain_lib.data.text.dataset_rows import HUB_NAME
from pretrain_lib.evaluate.scored import Score, last_scores
from pretrain_lib.export.scores_file import scores_of_file
from pretrain_lib.models.any_model import name_class
from pretrain_lib.models.flops import count_parameters
from pretrain_lib.models.gpt2 import GPT2Config
from pretrain_lib.models.interface import Model
from pretrain_lib.models.transformers_config import CausalLMConfig
from pretrain_lib.run_folder.folder import CHECKPOINTS, METRICS, PRECISIONS
from pretrain_lib.run_folder.markdown import code, fenced
from pretrain_lib.run_folder.metrics import human, human_time, perplexity
from pretrain_lib.run_folder.rows import Rows, last_row, read_rows, read_samples

CARD = "README.md"
RECIPE = ("model", "batch", "optimizer", "schedule")
OF_DATA = ("weights", "document_masking", "packing", "shuffle", "streaming")


@dataclass(frozen=True)
class Known:
    """What is known from a checkpoint and the run that contains it; empty if unknown."""

    manifest: dict = field(default_factory=dict)
    state: dict = field(default_factory=dict)
    rows: Rows = field(default_factory=list)
    """The metrics rows of the run up to the checkpoint."""
    samples: list[dict] = field(default_factory=list)
    """What the model wrote at the checkpoint."""
    scores: tuple[Score, ...] = ()
    scored_by: str = ""


def write_card(
    folder: Path, name: str, model: Model, known: Known, *, picture: str | None = None
) -> None:
    """Write `README.md` into an export, with the metadata header of the Hub.

    `picture` is the name of a file beside it that shows the curves.
    """
    has_tokenizer = (folder / "tokenizer.json").is_file()
    sections = [
        _front_matter(name, model, known),
        f"# {name}\n\n{_describe(model, known)}",
        _training_section(known, picture),
        _score_section(known),
        _sample_section(known),
        _use_section(known, model.config.context_length, has_tokenizer=has_tokenizer),
        LICENSE,
    ]
    text = "\n\n".join(section for section in sections if section)
    (folder / CARD).write_text(text + "\n", encoding="utf-8")


def gather(checkpoint: Path, model: Model, *, scores: Path | None = None) -> Known:
    """Collect what is known from a checkpoint, the run folder that contains it, and a scores file.

    `scores` is a file in lm-eval's format; without it, the scores are those of the run's last
    evaluation. Raises ValueError for a file in another format, or scores of another model.
    """
    manifest, state, rows, samples = {}, {}, [], []
    run = run_of(checkpoint)
    if (checkpoint / STATE).is_file():
        found = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        manifest = found if "run_id" in found else {}  # of a loop of one's own
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if state and run is not None:
        rows = [row for row in read_rows(run / METRICS) if row["step"] <= state["step"]]
        samples = [row for row in read_samples(run) if row["step"] == state["step"]]
    if scores is not None:
        found, by = scores_of_file(scores, checkpoint, model)
    else:
        found, step = last_scores(run or checkpoint, rows)
        by = f"lm-evaluation-harness during training, at step {step:,}"
    return Known(manifest, state, rows, samples, found, by if found else "")


def run_of(checkpoint: Path) -> Path | None:
    """Return the run folder that contains a checkpoint, None if it lies elsewhere."""
    folder = checkpoint.resolve().parent
    run = folder.parent
    return run if folder.name == CHECKPOINTS and (run / METRICS).is_file() else None


def _front_matter(name: str, model: Model, known: Known) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    evaluations = [
        EvalResult(
            task_type="text-generation",
            dataset_type=score.task,
            dataset_name=score.task,
            metric_type=score.metric,
            metric_value=score.value,
        )
        for score in known.scores
    ]
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["pretrain_lib", _family(model)[0]],
        datasets=_hub_names(known) or None,
        model_name=name if evaluations else None,
        eval_results=evaluations or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _family(model: Model) -> tuple[str, str]:
    if isinstance(model.config, CausalLMConfig):
        return model.config.model_type, name_class(model.config)
    if isinstance(model.config, GPT2Config):
        return "gpt2", "GPT-2"
    return ("qwen3", "Qwen3") if model.config.qk_norm else ("llama", "LLaMA")


def _origins(known: Known) -> list[Origin]:
    return find_origins(known.manifest["config"]["data"]) if known.manifest else []


def _hub_names(known: Known) -> list[str]:
    sources = [source for origin in _origins(known) for source in origin.sources]
    matches = [HUB_NAME.fullmatch(source) for source in sources if not Path(source).exists()]
    return list(dict.fromkeys(match[1] for match in matches if match))


def _describe(model: Model, known: Known) -> str:
    config, tokens = model.config, known.state.get("tokens")
    text = (
        f"A {_family(model)[1]} of {count_parameters(model):,} parameters with a context of "
        f"{config.context_length:,} tokens and a vocabulary of {config.vocabulary_size:,}"
    )
    names = list(dict.fromkeys(filter(None, map(_name_origin, _origins(known)))))
    of = f" of {' and '.join(names)}" if names else ""
    trained = f", pretrained on {human(tokens)} tokens{of} with pretrain_lib" if tokens else ""
    return (
        f"{text}{trained}. It is a base model: it was not trained to follow instructions, and what "
        f"it writes may be false or harmful."
    )


def _training_section(known: Known, picture: str | None) -> str:
    if not known.manifest:
        return ""
    config, state = known.manifest["config"], known.state
    train, validation = last_row(known.rows, "train"), last_row(known.rows, "validation")
    versions, world = known.manifest["versions"], known.manifest["world"]
    names = ("pretrain_lib", "torch", "accelerate", "transformers")
    rows = {
        "steps": f"{state['step']:,}",
        "tokens": f"{state['tokens']:,}",
        "training loss, last row": _loss(train),
        "validation loss": _loss(validation),
        "lowest validation loss": _lowest(state),
        "skipped updates": f"{state['skipped']:,}" if state["skipped"] else "",
        "text": "; ".join(_describe_origin(origin) for origin in _origins(known)),
        "fingerprint of the data": f"`{known.manifest['data_fingerprint']}`",
        "continued from": _parent(known.manifest["parent"]),
        "initial weights": Path(config["run"].get("initial_weights") or "").name,
        "time": f"{human_time(state['seconds'])} on {_device(world)}",
        "precision": PRECISIONS.get(world["precision"], world["precision"]),
        "software": ", ".join(f"{name} {versions[name]}" for name in names if name in versions),
        "revision": _revision(known.manifest["git"]),
    }
    chosen = {section: config[section] for section in RECIPE}
    chosen["data"] = {key: config["data"][key] for key in OF_DATA if config["data"].get(key)}
    chosen["run"] = {"seed": config["run"]["seed"]}
    settings = yaml.safe_dump(chosen, sort_keys=False)
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items() if value)
    curves = f"![The curves of the run]({picture})\n\n" if picture else ""
    recipe = f"The recipe:\n\n```yaml\n{settings}```"
    return f"## Training\n\n{curves}| | |\n|---|---|\n{table}\n\n{recipe}"


def _loss(row: dict) -> str:
    if row.get("loss") is None:
        return ""
    bits = row.get("bits_per_byte")
    per_byte = "" if bits is None else f", {bits:.4f} bits per byte"
    loss = f"{row['loss']:.4f} nats per token (perplexity {perplexity(row['loss']):.5g}{per_byte})"
    return f"{loss} at step {row['step']:,}"


def _lowest(state: dict) -> str:
    if state["best_loss"] is None or state["best_step"] == state["step"]:
        return ""
    return f"{state['best_loss']:.4f} nats per token at step {state['best_step']:,}"


def _parent(checkpoint: str | None) -> str:
    """Return the run and the checkpoint from which a run was started, if any."""
    path = Path(checkpoint or "")
    return f"{path.parent.parent.name}, {path.name}" if checkpoint else ""


def _device(world: dict) -> str:
    """Return the number and name of the devices, such as "8 x NVIDIA H100"."""
    return f"{world['processes']} x {world.get('device_name') or world['device']}"


def _name_origin(origin: Origin) -> str:
    """Name the text of an origin without the folder names of this machine."""
    if not origin.sources:
        return origin.path or ""
    return ", ".join(Path(s).name if Path(s).exists() else s for s in origin.sources)


def _describe_origin(origin: Origin) -> str:
    """Describe an origin without the folder names of this machine."""
    if not origin.sources:
        return f"the tokens of {origin.path}"
    names = _name_origin(origin)
    return names if origin.validation is None else f"{names} (held out: {origin.validation})"


def _revision(git: dict | None) -> str:
    return f"`{git['revision']}`{', with changes' if git['dirty'] else ''}" if git else ""


def _score_section(known: Known) -> str:
    if not known.scores:
        return ""
    lines = [f"## Scores\n\n{known.scored_by}.\n"]
    lines.append("| task | metric | items | shots | value | stderr |\n|---|---|---|---|---|---|")
    for score in known.scores:
        items = "" if score.items is None else f"{score.items:,}"
        shots = "" if score.shots is None else score.shots
        error = "" if score.error is None else f"{score.error:.4f}"
        numbers = f"{items} | {shots} | {score.value:.4f} | {error}"
        lines.append(f"| {score.task} | {score.metric} | {numbers} |")
    return "\n".join(lines)


def _sample_section(known: Known) -> str:
    """Return the first text that the model wrote at the checkpoint, if it wrote any there."""
    if not known.samples:
        return ""
    sample, step = known.samples[0], known.state["step"]
    intro = f"What the model wrote at step {step:,}, after the prompt {code(sample['prompt'])}:"
    return f"## Sample\n\n{intro}\n\n{fenced(sample['prompt'] + sample['text'])}"


def _use_section(known: Known, context_length: int, *, has_tokenizer: bool) -> str:
    """Return code that continues a prompt within the context: a token has at least one byte."""
    prompts = [sample["prompt"] for sample in known.samples if sample["prompt"].strip()]
    prompt = next((p for p in prompts if len(p.encode()) < context_length // 2), PROMPT)
    room = context_length - 1 - (len(prompt.encode()) if has_tokenizer else 0)
    text = USE if has_tokenizer else USE_IDS
    text = text.replace("NEW_TOKENS", str(max(1, min(50, room))))
    return text.replace("PROMPT", json.dumps(prompt, ensure_ascii=False))


PROMPT = "Once upon a time"
USE = """## Use

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # the folder of this file, or the model's name on the Hub
model = AutoModelForCausalLM.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
# Every document of the training text began with this token.
ids = torch.tensor([[tokenizer.bos_token_id] + tokenizer(PROMPT)["input_ids"]])
print(tokenizer.decode(model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=True)[0]))
```

Score it with `pretrain eval FOLDER --tasks hellaswag`, or with lm-evaluation-harness itself:

    lm_eval --model hf --model_args pretrained=FOLDER,dtype=float32 --tasks hellaswag"""
USE_IDS = """## Use

The model has no tokenizer: it reads and writes the token ids of its training data.

```python
import torch
from transformers import AutoModelForCausalLM

folder = "."  # the folder of this file, or the model's name on the Hub
model = AutoModelForCausalLM.from_pretrained(folder)
ids = torch.tensor([[0]])  # the ids to continue
print(model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=True)[0].tolist())
```"""
LICENSE = """## License and language

Neither is stated: whoever publishes the model adds them, as `license:` and `language:` at the top
of this file."""
