"""Model cards: what the hub reads of them, and figures that are those of the run."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from pretrain_lib import (
    GPT2,
    GPT2Config,
    TrainingState,
    build_adamw,
    load_tokenizer,
    open_corpus,
    save_checkpoint,
    save_pretrained,
    start_accelerator,
    train,
)
from pretrain_lib.export.card import Known, gather, write_card
from pretrain_lib.export.export import export_checkpoint
from pretrain_lib.models.hf import load_pretrained
from tests.conftest import change, read_rows
from tests.data.test_round_trip import VARIANTS

# What is read back is not the point here (tests/export/test_check.py).
pytestmark = pytest.mark.usefixtures("forked_reload")


def run(config):
    corpus = open_corpus(config)
    model = GPT2(config.model).initialize(config.run.seed)
    train(config, model, corpus, start_accelerator(config))
    return model


def table(card):
    """Return the rows of a card's tables of two columns."""
    cells = [line.strip("|").split("|") for line in card.splitlines() if line.startswith("| ")]
    return {row[0].strip(): row[1].strip() for row in cells if len(row) == 2}


def results_of(parameters, **changes):
    scores = {"acc,none": 0.25, "acc_stderr,none": 0.0433, "acc_norm_per_token,none": 0.375}
    return {
        "results": {"alias": {}, "hellaswag": scores | {"acc_norm_per_token_stderr,none": "N/A"}},
        "n-shot": {"hellaswag": 0},
        "n-samples": {"hellaswag": {"original": 10_042, "effective": 1_000}},
        "config": {"model_num_parameters": parameters, "limit": None},
        "lm_eval_version": "0.4.13",
    } | changes


def add_row(folder, **row):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_the_card_of_a_run_tells_what_its_rows_tell(recipe, tmp_path):
    run(recipe)
    folder, out = tmp_path / "run", tmp_path / "my_model"
    add_row(
        folder, kind="evaluation", step=8, tokens=2048, **{"mine/acc": 0.5, "mine/acc_stderr": 0.1}
    )
    add_row(folder, kind="evaluation", step=9, tokens=2304, **{"mine/acc": 0.9})  # after it
    export_checkpoint(folder / "checkpoints" / "step-00000008", out)
    card = ModelCard.load(out / "README.md")
    head = card.data.to_dict()
    assert (head["library_name"], head["pipeline_tag"]) == ("transformers", "text-generation")
    assert card.data.tags == ["pretrain_lib", "gpt2"]
    assert card.data.license is None and card.data.datasets is None
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("mine", "acc", 0.5)
    assert "| mine | acc |  |  | 0.5000 | 0.1000 |" in card.content
    assert card.text.strip().startswith("# run\n") and card.data.model_name == "run"
    (sample,) = [
        row for line in (folder / "samples.jsonl").open() if (row := json.loads(line))["step"] == 8
    ]
    said = f'at step 8, after the prompt `"def "`:\n\n```text\ndef {sample["text"]}\n```'
    used = '[tokenizer.bos_token_id] + tokenizer("def ")["input_ids"]'
    assert said in card.content and used in card.content

    rows, told = read_rows(folder, clock=True), table(card.content)
    last = {kind: [r for r in rows if r["kind"] == kind][-1] for kind in ("train", "validation")}
    assert (told["steps"], told["tokens"]) == ("8", "2,048")
    for name, kind in (("training loss, last row", "train"), ("validation loss", "validation")):
        assert told[name].startswith(f"{last[kind]['loss']:.4f} nats per token")
        assert told[name].endswith("at step 8")
    assert f"{last['validation']['bits_per_byte']:.4f} bits per byte" in told["validation loss"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert told["fingerprint of the data"] == f"`{manifest['data_fingerprint']}`"
    assert told["text"].endswith("(held out: hash:0.1)")
    assert str(tmp_path.parent) not in card.content  # nothing of this machine's folders
    precision = manifest["world"]["precision"]
    assert told["precision"] == {"no": "fp32", "bf16": "bf16 autocast, fp32 weights"}[precision]
    assert "pretrained on 2.048K tokens of text" in card.content
    settings = yaml.safe_load(card.content.split("```yaml\n")[1].split("```")[0])
    config = manifest["config"]
    for section in ("model", "batch", "optimizer", "schedule"):
        assert settings[section] == config[section]
    assert settings["run"] == {"seed": recipe.run.seed}


def test_an_earlier_checkpoint_has_the_figures_of_its_step(recipe, tmp_path):
    run(change(recipe, checkpoint={"every": 4}))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000004"
    model = load_pretrained(checkpoint)
    write_card(tmp_path, "name", model, gather(checkpoint, model))
    told = table((tmp_path / "README.md").read_text())
    rows = [row for row in read_rows(tmp_path / "run") if row["step"] == 4]
    (loss,) = [row["loss"] for row in rows if row["kind"] == "train"]
    assert told["training loss, last row"].startswith(f"{loss:.4f} ")
    (loss,) = [row["loss"] for row in rows if row["kind"] == "validation"]
    assert told["validation loss"].startswith(f"{loss:.4f} ")


@pytest.fixture
def bare(tmp_path):
    """A model folder without a run, and its model."""
    config = GPT2Config(vocabulary_size=50, context_length=16, num_layers=1, num_heads=2, width=8)
    save_pretrained(GPT2(config).initialize(0), tmp_path / "bare", tokenizer=None)
    return tmp_path / "bare"


@pytest.mark.parametrize("fatal_rename", [1, 2])
def test_an_export_that_ends_between_its_renames_is_made_good_by_the_next(
    bare, tmp_path, monkeypatch, fatal_rename
):
    out, calls, rename = tmp_path / "out", [], Path.rename
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "own.txt").write_text("of the user")
    export_checkpoint(bare, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def rename_or_fail(path, target):
        calls.append(path)
        if len(calls) == fatal_rename:
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", rename_or_fail)
        export_checkpoint(bare, out)
    export_checkpoint(bare, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"bare", "out", "out.tmp"}
    assert (tmp_path / "out.tmp" / "own.txt").read_text() == "of the user"


def test_a_bare_folder_has_a_card_that_says_less(bare, tmp_path):
    out = tmp_path / "out"
    export_checkpoint(bare, out)
    card = ModelCard.load(out / "README.md")
    assert card.data.eval_results is None and table(card.content) == {}
    assert "## Training" not in card.content and "## Scores" not in card.content
    # 50 x 8 + 16 x 8 embeddings, 12 x 8 x 8 + 13 x 8 of the block, 2 x 8 of the last norm
    assert "A GPT-2 of 1,416 parameters with a context of 16 tokens" in card.content
    (out / "config.json").unlink()
    for name in ("model.safetensors", "generation_config.json"):
        (out / name).unlink()
    with pytest.raises(ValueError, match="neither empty nor an export"):
        export_checkpoint(bare, out)  # a README alone is somebody's own


def use_as_shown(folder, tokenizer, monkeypatch, context_length=24):
    """Write a small model with its card, run the card's code in its folder, return the names."""
    size = 50 if tokenizer is None else tokenizer.vocabulary_size
    shape = {"num_layers": 1, "num_heads": 2, "width": 8, "context_length": context_length}
    model = GPT2(GPT2Config(vocabulary_size=size, **shape)).initialize(0)
    save_pretrained(model, folder, tokenizer=tokenizer)
    write_card(folder, "name", model, Known())
    monkeypatch.chdir(folder)
    names = {}
    exec((folder / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
    return names


@pytest.mark.parametrize("name", [name for name, (_, keeps) in VARIANTS.items() if keeps])
def test_the_code_of_a_card_gives_the_ids_of_training(name, tmp_path, monkeypatch, capsys):
    tokenizer, prompt = VARIANTS[name][0], "Once upon a time"
    names = use_as_shown(tmp_path, tokenizer, monkeypatch)
    (expected,) = tokenizer.encode_documents([prompt])
    assert names["ids"].tolist() == [expected.tolist()]
    assert prompt in capsys.readouterr().out


def test_the_card_of_a_model_without_a_tokenizer_needs_none(tmp_path, monkeypatch, capsys):
    for context_length, length in ((24, 24), (96, 51)):
        use_as_shown(tmp_path, None, monkeypatch, context_length)
        assert len(json.loads(capsys.readouterr().out)) == length
    card = (tmp_path / "README.md").read_text()
    assert "AutoTokenizer" not in card and "lm_eval" not in card and "pretrain eval" not in card


def test_scores_of_a_file_are_shown_with_their_errors(bare, tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(results_of(1416)))
    export_checkpoint(bare, tmp_path / "out", scores=path)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found == {"acc": 0.25, "acc_norm_per_token": 0.375}
    assert card.data.model_name == "out"
    assert "| hellaswag | acc | 1,000 | 0 | 0.2500 | 0.0433 |" in card.content
    assert "| hellaswag | acc_norm_per_token | 1,000 | 0 | 0.3750 |  |" in card.content
    assert "lm-evaluation-harness 0.4.13.\n" in card.content
    limited = results_of(1416, config={"limit": 100})
    path.write_text(json.dumps(limited))
    model = load_pretrained(bare)
    write_card(tmp_path, "name", model, gather(bare, model, scores=path))
    assert "the first 100 items of each task" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps(results_of(1417)), "of a model of 1,417 parameters, but this one has 1,416"),
        ("{}", "holds no lm-eval results"),
        ("not json", "holds no lm-eval results"),
    ],
)
def test_scores_that_are_not_this_model_s_are_refused(bare, tmp_path, content, message):
    path = tmp_path / "scores.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        export_checkpoint(bare, tmp_path / "out", scores=path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bare", "scores.json"]


def scored(folder, path, *, as_text=False):
    """Write results that say that lm-eval scored a folder."""
    arguments = f"pretrained={folder},dtype=float32" if as_text else {"pretrained": str(folder)}
    path.write_text(json.dumps(results_of(1416, config={"model_args": arguments})))
    return path


@pytest.mark.parametrize("as_text", [False, True])
def test_scores_of_a_folder_with_other_weights_are_refused(bare, tmp_path, as_text):
    other, path = tmp_path / "other", tmp_path / "scores.json"
    save_pretrained(GPT2(load_pretrained(bare).config).initialize(1), other, tokenizer=None)
    scored(other, path, as_text=as_text)
    message = f"has the scores of {other}, whose weights are not those of {bare}: score that"
    with pytest.raises(ValueError, match=re.escape(message)):
        export_checkpoint(bare, tmp_path / "out", scores=path)
    assert not (tmp_path / "out").exists()
    shutil.rmtree(other)  # then its number of parameters is all that is known
    export_checkpoint(bare, tmp_path / "out", scores=path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_an_export_of_the_same_weights_are_taken(bare, tmp_path, dtype):
    first, path = tmp_path / "first", tmp_path / "scores.json"
    export_checkpoint(bare, first, dtype=dtype, max_shard_bytes=1000)
    scored(first, path)
    for number, own in enumerate((torch.float32, torch.bfloat16)):
        export_checkpoint(bare, tmp_path / f"out{number}", dtype=own, scores=path)
    again = tmp_path / "out1"  # in bf16
    export_checkpoint(again, tmp_path / "out2", scores=path)
    export_checkpoint(bare, tmp_path / "out3", scores=scored(bare, path))


def test_sources_on_the_hub_are_named_as_data_sets(recipe, bare, tmp_path):
    run(change(recipe, run={"max_steps": 0}))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000000"
    path = checkpoint / "training" / "manifest.json"
    manifest = json.loads(path.read_text())
    sources = ["Owner/name:part@v1", "Owner/name:other", str(tmp_path), "python-stdlib"]
    manifest["config"]["data"] |= {"path": None, "source": sources, "validation": "first:100e6"}
    path.write_text(json.dumps(manifest))
    model = load_pretrained(checkpoint)
    write_card(tmp_path, "name", model, gather(checkpoint, model))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.datasets == ["Owner/name"]
    text = f"{sources[0]}, {sources[1]}, {tmp_path.name}, python-stdlib (held out: first:100e6)"
    assert table(card.content)["text"] == text
    assert "training loss, last row" not in table(card.content)


def test_a_run_in_fp32_is_said_to_be_so_and_its_curves_are_shown(recipe, bare, tmp_path):
    run(change(recipe, run={"max_steps": 1}))
    checkpoint = tmp_path / "run" / "checkpoints" / "step-00000001"
    path = checkpoint / "training" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["world"]["precision"] = "no"
    path.write_text(json.dumps(manifest))
    model = load_pretrained(checkpoint)
    write_card(tmp_path, "name", model, gather(checkpoint, model), picture="curves.png")
    card = (tmp_path / "README.md").read_text()
    assert table(card)["precision"] == "fp32"
    assert "![The curves of the run](curves.png)" in card


def test_a_picture_travels_with_an_export_which_can_be_replaced(recipe, bare, tmp_path):
    run(change(recipe, run={"max_steps": 2}, log={"every": 1}))
    checkpoint, out = tmp_path / "run" / "checkpoints" / "step-00000002", tmp_path / "out"

    def draw(path, step):
        path.write_text(f"step {step}")

    for _ in range(2):
        export_checkpoint(checkpoint, out, draw=draw)
    assert (out / "curves.png").read_text() == "step 2"
    assert "![The curves of the run](curves.png)" in (out / "README.md").read_text()
    export_checkpoint(bare, out, draw=draw)  # which has none
    assert not (out / "curves.png").exists()


@pytest.mark.parametrize("manifest", [{}, {"note": "by hand"}])
def test_a_checkpoint_of_a_loop_of_one_s_own_is_exported_and_begins_runs(
    recipe, manifest, tmp_path, prepared
):
    model, state = GPT2(recipe.model).initialize(3), TrainingState()
    optimizer, tokenizer = (
        build_adamw(model, learning_rate=1e-3),
        load_tokenizer(prepared / "tokenizer"),
    )
    state.count_step(windows=4, tokens=256, seconds=0.1)
    path = save_checkpoint(
        tmp_path / "own" / "checkpoints",
        state,
        model,
        optimizer,
        tokenizer=tokenizer,
        manifest=manifest,
    )
    assert export_checkpoint(path, tmp_path / "out") < 1e-6
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pretrained on 256 tokens" in card and "## Training" not in card
    fork = change(recipe, run={"resume": str(path)})
    with pytest.raises(
        ValueError, match=f"was saved by a loop of one's own, .*initial_weights={path}"
    ):
        run(fork)
    begun = run(change(recipe, run={"initial_weights": str(path), "max_steps": 0}))
    for ours, theirs in zip(begun.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
