"""Families of transformers through the library: the cells of the table in docs/architectures.md."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pretrain_lib import (
    IGNORED_TARGET,
    build_adamw,
    build_model,
    evaluate_folder,
    evaluate_model,
    generate,
    load_pretrained,
    load_tokenizer,
    open_corpus,
    open_tasks,
    start_accelerator,
    train,
    train_step,
    verify_checkpoint,
)
from pretrain_lib.evaluate.local_tasks import write_local_tasks
from pretrain_lib.export.export import export_checkpoint
from pretrain_lib.models.transformers_family import check_causal, check_documents
from tests.conftest import (
    VOCABULARY,
    change,
    read_rows,
    reloading_in_forks,
    run_python,
    small_recipe,
)
from tests.families import FAMILIES, MIX_DOCUMENTS, OWN_LOGITS, family

pytestmark = pytest.mark.slow

STEPS, MICRO_BATCHES, B, T, V = 20, 2, 2, 16, 61


def batches():
    """Yield ids (B x MICRO_BATCHES, T + 1) whose next is likely a function of the last."""
    generator = torch.Generator().manual_seed(0)
    successor = torch.randperm(V, generator=generator)
    for _ in range(STEPS):
        ids = torch.randint(V, (B * MICRO_BATCHES, T + 1), generator=generator)
        for t in range(1, T + 1):
            follow = torch.rand(len(ids), generator=generator) < 0.8
            ids[:, t] = torch.where(follow, successor[ids[:, t - 1]], ids[:, t])
        targets = ids[:, 1:].clone()
        targets[torch.rand(targets.shape, generator=generator) < 0.2] = IGNORED_TARGET
        yield ids[:, :-1], targets


def train_ours(config, micro_batches):
    """Yield the losses of `train_step`, over several micro-batches a step."""
    accelerator = Accelerator(cpu=True)
    model = build_model(config).initialize(0)
    optimizer = build_adamw(model, learning_rate=3e-3)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    prepared.train()
    for step, (ids, targets) in enumerate(batches()):
        parts = zip(ids.chunk(micro_batches), targets.chunk(micro_batches), strict=True)
        parts = [{"input_ids": i, "targets": t} for i, t in parts]
        options = {"learning_rate": 3e-3, "max_grad_norm": 1.0, "seed": 0, "step": step}
        yield train_step(accelerator, prepared, optimizer, parts, **options).loss


def train_theirs(config):
    """Yield the losses of a plain loop over transformers' model and its own loss.

    A load-balancing loss is in what is minimized, and not in what is yielded.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config.hf, dtype=torch.float32).train()
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    spared = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": decayed, "weight_decay": 0.1},
        {"params": spared, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    for ids, targets in batches():
        output = model(input_ids=ids, labels=targets, shift_labels=targets)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        router_loss = getattr(output, "aux_loss", None)
        more = 0.0 if router_loss is None else config.hf.router_aux_loss_coef * router_loss.item()
        yield output.loss.item() - more


@pytest.mark.parametrize("name", FAMILIES)
def test_train_equals_a_plain_loop_with_the_loss_of_transformers(name):
    config = family(name)
    # The load-balancing loss is a mean over a forward, so it depends on what is read in one.
    ours = list(train_ours(config, 1 if name == "olmoe" else MICRO_BATCHES))
    assert ours == pytest.approx(list(train_theirs(config)), abs=1e-4)
    assert ours[-1] < ours[0] - 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_is_fused_wherever_the_logits_are_a_product(name):
    model = build_model(family(name))
    assert model.has_plain_head == (name not in OWN_LOGITS)


@pytest.mark.parametrize("name", FAMILIES)
def test_mask_keeps_documents_apart_or_is_refused_by_name(name):
    config = family(name)
    check_causal(config)
    if name in MIX_DOCUMENTS:
        with pytest.raises(ValueError, match=f"{config.model_type} does not keep documents apart"):
            check_documents(config)
        return
    model = build_model(config).initialize(0).eval()
    ids = torch.randint(V, (2, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        packed = model(ids, document_ends=torch.tensor([[9, 20], [14, 20]]))
        torch.testing.assert_close(packed[:1, 9:], model(ids[:1, 9:]), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed[1:, 14:], model(ids[1:, 14:]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_generate_is_what_its_own_generate_writes(name):
    model = build_model(family(name)).initialize(0).eval()
    model.model.generation_config.eos_token_id = None
    generator = torch.Generator().manual_seed(2)
    prompts = [torch.randint(V, (n,), generator=generator).tolist() for n in (3, 7, 7)]
    options = {"new_tokens": 12, "context_length": 64, "temperature": 0.0}
    found = generate(model, prompts, **options)
    for prompt, own in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert own == expected[0, len(prompt) :].tolist()


def run(config):
    corpus, accelerator = open_corpus(config), start_accelerator(config)
    with torch.device("meta"):
        model = build_model(config.model)
    train(config, model, corpus, accelerator)
    return model


@pytest.fixture(scope="module")
def tasks(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    sizes = {"context_characters": 60, "ending_characters": 20, "document_characters": 200}
    return folder, write_local_tasks(prepared, folder, items=4, **sizes)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, prepared, tmp_path_factory, tasks):
    """A run of a family: its recipe and its model at the end."""
    folder = tmp_path_factory.mktemp(request.param)
    config = change(
        small_recipe(prepared, folder),
        samples={"every": 100},
        validation={"every": 100, "tokens": 256},
        schedule={"tokens": 6 * 256},
        scores={"tasks": ["heldout_choice"], "include_path": str(tasks[0]), "every": 100}
        if request.param == "qwen3"
        else {},
    )
    config = dataclasses.replace(config, model=family(request.param, vocab_size=VOCABULARY))
    return config, run(config)


def test_resume_is_bit_equal(trained, tmp_path):
    config, _ = trained
    resumed = change(config, run={"dir": str(tmp_path / "resumed")})
    shutil.copytree(config.run.dir, resumed.run.dir)
    shutil.rmtree(Path(resumed.run.dir) / "checkpoints" / "step-00000006")
    run(resumed)
    assert read_rows(resumed.run.dir) == read_rows(config.run.dir)
    ends = [Path(c.run.dir) / "checkpoints" / "step-00000006" for c in (config, resumed)]
    assert verify_checkpoint(ends[0]) == []
    for file in ("model.safetensors", "training/optimizer-00001-of-00001.safetensors"):
        one, other = (load_file(end / file) for end in ends)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_is_the_folder_that_transformers_writes(trained, tmp_path):
    config, model = trained
    checkpoint = Path(config.run.dir) / "checkpoints" / "step-00000006"
    model.model.save_pretrained(tmp_path)
    ours, theirs = (load_file(f / "model.safetensors") for f in (checkpoint, tmp_path))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (checkpoint, tmp_path))
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), 0)
    assert ours == theirs | {key: ours[key] for key in ends}


def test_score_is_that_of_lm_eval_item_by_item(trained, tasks, prepared):
    config, model = trained
    folder, names = tasks
    live = scored_live(model, tasks, prepared)
    checkpoint = Path(config.run.dir) / "checkpoints" / "step-00000006"
    options = {"include_path": folder, "harness": True, "log_samples": True}
    theirs = evaluate_folder(checkpoint, names, **options)["samples"]
    assert live.keys() == theirs.keys() == set(names)
    for name in names:
        ours, others = numbers_of(live[name]), numbers_of(theirs[name])
        assert len(ours) >= 4
        assert ours == pytest.approx(others, abs=2e-4)


@pytest.mark.parametrize("trained", ["qwen3", "gemma3"], indirect=True)
def test_plain_lm_eval_scores_an_export_as_the_live_model(trained, tasks, prepared, tmp_path):
    config, model = trained
    folder, names = tasks
    checkpoint = Path(config.run.dir) / "checkpoints" / "step-00000006"
    with reloading_in_forks():
        export_checkpoint(checkpoint, tmp_path / "export")
    command = ["-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={tmp_path / 'export'},dtype=float32"]
    command += ["--tasks", ",".join(names), "--include_path", folder]
    command += ["--output_path", tmp_path / "scores", "--log_samples"]
    result = run_python(*command, environment={"HF_HUB_OFFLINE": "1"})
    assert result.returncode == 0, result.stderr
    live = scored_live(model, tasks, prepared)
    for name in names:
        (file,) = (tmp_path / "scores").rglob(f"samples_{name}_*.jsonl")
        theirs = [json.loads(line) for line in file.read_text().splitlines()]
        theirs.sort(key=lambda sample: sample["doc_id"])
        assert numbers_of(live[name]) == pytest.approx(numbers_of(theirs), abs=2e-4)


def scored_live(model, tasks, prepared):
    """Return lm-eval's samples of the model in memory, by task."""
    folder, names = tasks
    opened, tokenizer = (
        open_tasks(names, include_path=folder),
        load_tokenizer(prepared / "tokenizer"),
    )
    return evaluate_model(model, tokenizer, opened, log_samples=True)["samples"]


def numbers_of(samples):
    """Return every number that the model answered with, in the order of the items."""
    in_order = sorted(samples, key=lambda sample: sample["doc_id"])
    answers = [response for sample in in_order for response in sample["resps"]]
    flat = []
    while answers:
        answer = answers.pop()
        if isinstance(answer, list | tuple):
            answers.extend(answer)
        else:
            flat.append(float({"True": True, "False": False}.get(answer, answer)))
    return flat


def test_export_is_read_again_by_transformers(trained, tmp_path):
    config, model = trained
    checkpoint = Path(config.run.dir) / "checkpoints" / "step-00000006"
    with reloading_in_forks():
        assert export_checkpoint(checkpoint, tmp_path / "export") <= 1e-5
    again = load_pretrained(tmp_path / "export", by_transformers=True)
    for (name, one), (_, other) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
