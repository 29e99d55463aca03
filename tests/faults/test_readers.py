"""Input damaged at random, for every reader: a right value, or one line that says what is wrong."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pretrain_lib import GPT2Config, Job, Recipe, prepare
from pretrain_lib.checkpoint.folders import verify_checkpoint
from pretrain_lib.config.arguments import parse_recipe
from pretrain_lib.data.prepare.spool import open_spool
from pretrain_lib.data.prepare.target import is_prepared
from pretrain_lib.data.text.tokenizer import load_tokenizer
from pretrain_lib.data.tokens.manifests import parse_manifest
from pretrain_lib.data.tokens.shards import read_manifest
from pretrain_lib.data.tokens.verify import verify_folder
from pretrain_lib.evaluate.scored import read_results
from pretrain_lib.files.writes import write_json
from pretrain_lib.models.hf_config import read_config
from pretrain_lib.report.changes import changed_settings
from pretrain_lib.report.runs import Run, open_runs
from pretrain_lib.report.runs import read_manifest as read_run_manifest
from pretrain_lib.run_folder.cut import drop_rows_after
from pretrain_lib.run_folder.layout import is_run_folder
from pretrain_lib.run_folder.rows import column, read_rows
from pretrain_lib.run_folder.status import read_status
from tests.faults.inputs import VALUES, by_value_or_byte, damaged, reads, tries

pytestmark = [pytest.mark.moderate, pytest.mark.filterwarnings("ignore")]
ROW = {"kind": "train", "step": 1, "tokens": 8, "loss": 1.5, "lr": 1e-3, "seconds": 1.0}
ROW |= {"grad_norm": 1.0, "tokens_per_second": 9.0, "mfu": None}


@tries()
@given(data=st.data())
def test_overlays(data, tmp_path):
    text = "run: {seed: 1, max_time: 2h}\nbatch:\n  tokens: 512\nsamples: {prompts: [a]}\n"
    path = tmp_path / "overlay.yaml"
    value = yaml.safe_dump(data.draw(VALUES), allow_unicode=True).encode(errors="replace")
    path.write_bytes(data.draw(damaged(text.encode()) | st.just(b"run: " + value)))
    reads(lambda: parse_recipe(Recipe(model=GPT2Config()), arguments=["--config", str(path)]))


@tries()
@given(data=st.data())
def test_rows_of_metrics(data, tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = "".join(json.dumps(ROW | {"step": step}) + "\n" for step in range(1, 4)).encode()
    row = data.draw(st.fixed_dictionaries({}, optional=dict.fromkeys(ROW, VALUES)))
    other = json.dumps(ROW | row).encode() + b"\n"
    path.write_bytes(data.draw(damaged(lines) | st.just(lines + other)))

    def read():
        rows = read_rows(path)
        for name in ("loss", "lr", "grad_norm", "tokens_per_second", "mfu"):
            column(rows, "train", name)
        for axis in ("tokens", "steps", "hours"):
            open_runs([tmp_path], axis=axis)

    reads(read)
    drop_rows_after(path, 2)
    assert all(row["step"] <= 2 for row in read_rows(path))


@tries()
@given(data=st.data())
def test_manifests_of_prepared_folders(data, prepared, tmp_path):
    whole = prepared / "manifest.json"
    manifest = read_manifest(prepared)
    old = json.dumps({k: v for k, v in manifest.items() if k not in ("files", "manifest_sha256")})
    content = data.draw(damaged(whole.read_bytes()) | by_value_or_byte(old.encode()))
    (tmp_path / "manifest.json").write_bytes(content)
    reads(lambda: parse_manifest(tmp_path / "manifest.json"))
    reads(lambda: verify_folder(tmp_path))
    is_prepared(tmp_path)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder of which `prepare` was killed before its manifest, and the job."""
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "text.jsonl").write_text(
        "".join(json.dumps({"text": f"sun {n} moon"}) + "\n" for n in range(20))
    )
    job = Job((str(folder / "text.jsonl"),), train_tokenizer=260, validation="hash:0.2")
    prepare(job, folder / "data", workers=1, quiet=True)
    (folder / "data" / "manifest.json").unlink()
    return folder / "data", job


@tries()
@given(data=st.data())
def test_records_of_a_prepare_that_was_killed(data, interrupted, tmp_path):
    whole, job = interrupted
    names = sorted(path.name for path in whole.glob("*.json"))
    assert {"job.json", "unit-00000.json", "train-00000-000.json"} <= set(names)
    name, folder = data.draw(st.sampled_from(names)), tmp_path / "data"
    content = data.draw(by_value_or_byte((whole / name).read_bytes()))
    shutil.rmtree(folder, ignore_errors=True)
    (shutil.copytree(whole, folder) / name).write_bytes(content)
    reads(lambda: prepare(job, folder, workers=1, quiet=True))


@tries()
@given(data=st.data())
def test_records_of_a_stream(data, interrupted, tmp_path):
    text = interrupted[0].parent / "text.jsonl"
    job = Job((str(text),), str(interrupted[0] / "tokenizer"), validation="first:20")
    folder = tmp_path / "spool"
    shutil.rmtree(folder, ignore_errors=True)
    open_spool(job, folder, segment_tokens=64, quiet=True)
    write_json(folder / "cursor-00000001.json", {"begins": {"unit": 0, "tokens": 64}})
    names = ["spool.json", "cursor-00000001.json", "job.json", "manifest.json"]
    name = data.draw(st.sampled_from(names))
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(data.draw(by_value_or_byte(content)))
    reads(lambda: open_spool(job, folder, segment_tokens=64, quiet=True).read_cursor(1))


@tries()
@given(data=st.data())
def test_results_of_evaluations(data, tmp_path):
    results = {
        "results": {"mine": {"alias": "mine", "acc,none": 0.5, "acc_stderr,none": 0.1}},
        "config": {"limit": None, "model_num_parameters": 9},
        "n-shot": {"mine": 0},
        "n-samples": {"mine": {"original": 4, "effective": 4}},
    }
    path = tmp_path / "scores.json"
    path.write_bytes(data.draw(by_value_or_byte(json.dumps(results).encode())))
    reads(lambda: read_results(path))


@tries()
@given(data=st.data())
def test_settings_of_a_recipe_in_a_report(data, tmp_path):
    settings = {"model": {"width": 8}, "run": {"seed": 1}}
    content = data.draw(by_value_or_byte(json.dumps(settings).encode()))  # JSON is YAML
    (tmp_path / "recipe.yaml").write_bytes(content)
    run = Run(tmp_path, "run", [], {"config": settings})
    reads(lambda: changed_settings(run))


@tries()
@given(data=st.data())
def test_files_of_a_run(data, tmp_path):
    manifest = {"config": {"model": {"width": 8}}, "data_fingerprint": "", "starts": []}
    status = {"state": "done", "step": 3, "reason": ""}
    for name, content in (("manifest.json", manifest), ("status.json", status)):
        (tmp_path / name).write_bytes(data.draw(by_value_or_byte(json.dumps(content).encode())))
    (tmp_path / "training").mkdir(exist_ok=True)
    files = json.dumps({"config.json": {"xxh3_128": "0" * 32, "bytes": 3}}).encode()
    (tmp_path / "training" / "files.json").write_bytes(data.draw(by_value_or_byte(files)))
    read_status(tmp_path)
    is_run_folder(tmp_path)
    reads(lambda: read_run_manifest(tmp_path))
    assert isinstance(verify_checkpoint(tmp_path), list)


@tries()
@given(data=st.data())
def test_tokenizers(data, prepared, tmp_path):
    folder = tmp_path / "tokenizer"
    shutil.copytree(prepared / "tokenizer", folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    content = (prepared / "tokenizer" / name).read_bytes()
    (folder / name).write_bytes(data.draw(by_value_or_byte(content)))
    reads(lambda: load_tokenizer(folder).encode("some text"))


@tries()
@given(data=st.data())
def test_configurations_of_models(data, tmp_path):
    config = {"model_type": "gpt2", "n_embd": 8, "n_head": 2, "n_layer": 1, "n_positions": 8}
    config |= {"vocab_size": 300, "architectures": ["GPT2LMHeadModel"]}
    content = data.draw(by_value_or_byte(json.dumps(config).encode()))
    (tmp_path / "config.json").write_bytes(content)
    reads(lambda: read_config(tmp_path))


def test_a_value_that_is_none_of_ours_is_no_row(tmp_path):
    for line in ("null", "[]", '{"step": "1"}', '{"kind": "train", "step": null, "tokens": 1}'):
        Path(tmp_path / "metrics.jsonl").write_text(line + "\n")
        with pytest.raises(ValueError, match="metrics.jsonl, line 1 is not a row"):
            read_rows(tmp_path / "metrics.jsonl")
