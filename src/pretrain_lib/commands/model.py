"""The subcommands for models and runs: tasks, export, eval, sample."""

import argparse
from pathlib import Path

import torch

from pretrain_lib.checkpoint.folders import FILES, find_newest, still_there, verify_checkpoint
from pretrain_lib.data.text.tokenizer import load_tokenizer
from pretrain_lib.evaluate.harness import evaluate_folder
from pretrain_lib.evaluate.local_tasks import write_local_tasks
from pretrain_lib.evaluate.results import format_table, write_results
from pretrain_lib.evaluate.suites import SUITES
from pretrain_lib.export.card import run_of
from pretrain_lib.export.export import check_export_folder, export_checkpoint
from pretrain_lib.export.hub import check_hub, push_to_hub
from pretrain_lib.files.outputs import check_file
from pretrain_lib.models.any_model import is_ours, load_pretrained
from pretrain_lib.models.generation import sample_texts
from pretrain_lib.quiet import without_foreign_progress
from pretrain_lib.report.pictures import plot_runs
from pretrain_lib.run_folder.folder import CHECKPOINTS

LM_EVAL_MODEL = "lm-eval's own model"
OUR_MODEL = "our model under lm-eval (--harness for its own)"


def run_tasks(options: argparse.Namespace) -> None:
    """Build lm-eval tasks from held-out text."""
    names = write_local_tasks(options.folder, options.out, items=options.items)
    print(f"{options.out}: {', '.join(names)} (--tasks NAME --include_path {options.out})")


def run_export(options: argparse.Namespace) -> None:
    """Export a checkpoint as a Hugging Face model folder, and optionally upload it to the hub."""
    name = options.push_to_hub
    if options.private and name is None:
        raise ValueError("--private is for a repository on the hub: give --push_to_hub OWNER/NAME")
    check_export_folder(options.out, options.checkpoint)
    if name is not None:
        check_hub(name)
    source = model_folder(options.checkpoint)
    with without_foreign_progress():
        difference = export_checkpoint(
            source,
            options.out,
            dtype=getattr(torch, options.dtype),
            scores=options.scores,
            draw=lambda path, step: plot_runs([run_of(source)], path, last_step=step),
            max_shard_bytes=options.max_shard_size,
        )
    print(
        f"{options.out}: exported from {source}; loaded again by transformers, its logits are "
        f"within {difference:.1e} of the model's"
    )
    if name is not None:
        with without_foreign_progress():
            address = push_to_hub(options.out, name, private=options.private)
        print(f"{options.out}: uploaded to {address}")


def run_eval(options: argparse.Namespace) -> None:
    """Score a model folder with lm-eval-harness."""
    if options.out is not None:
        check_file(options.out, named="--out ", holds=["results"])
    check_device(options.device)
    if options.log_samples and options.out is None:
        raise ValueError("--log_samples needs --out FILE: samples_TASK.jsonl files go beside it")
    folder = model_folder(options.folder)
    by_lm_eval = options.harness or not is_ours(folder)
    print(f"scoring {folder} with {LM_EVAL_MODEL if by_lm_eval else OUR_MODEL}")
    with without_foreign_progress():
        results = evaluate_folder(
            folder,
            options.tasks if options.suite is None else SUITES[options.suite],
            include_path=options.include_path,
            limit=options.limit,
            batch_size=options.batch_size,
            dtype=options.dtype,
            device=options.device,
            num_fewshot=options.num_fewshot,
            harness=by_lm_eval,
            log_samples=options.log_samples,
        )
    print(format_table(results))
    if options.out is not None:
        write_results(results, options.out)
        print(f"results in {options.out}")


def run_sample(options: argparse.Namespace) -> None:
    """Print texts sampled from a model."""
    folder = model_folder(options.folder)
    with still_there(folder):
        tokenizer, model = load_tokenizer(folder), load_pretrained(folder)
    texts = sample_texts(
        model.to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer,
        options.prompt,
        per_prompt=options.count,
        new_tokens=options.tokens,
        context_length=model.config.context_length,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
    )
    for text in texts:
        print(f"{text['prompt']}{text['text']}\n---")


def check_device(name: str | None) -> None:
    """Raise ValueError if this machine does not have the device `name`."""
    if name is None or name == "cpu":
        return
    kind, _, index = name.partition(":")
    count = torch.cuda.device_count() if kind == "cuda" else int(torch.backends.mps.is_available())
    if int(index or 0) >= count:
        raise ValueError(f"--device {name} is not on this machine, which has {count} of {kind}")


def model_folder(path: Path) -> Path:
    """Return `path` if it is a model folder, or the newest checkpoint of a run folder.

    Raises ValueError for other folders, and for damaged checkpoints.
    """
    # Slow, so not between the choice of a checkpoint and its reading: its run may remove it.
    import transformers.utils  # noqa: F401

    with still_there(path):
        if (path / FILES).is_file() and (problems := verify_checkpoint(path)):
            raise ValueError(f"{path} is not whole: {'; '.join(problems)}")
    if (path / "config.json").is_file():
        return path
    newest = find_newest(path / CHECKPOINTS) if (path / CHECKPOINTS).is_dir() else None
    if newest is None:
        raise ValueError(f"{path} is neither a model folder (config.json) nor a run with one")
    return newest
