"""`acc_norm_per_token` against log-likelihoods and token counts taken from transformers."""

import json
import math
import random
import statistics

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from pretrain_lib import GPT2, GPT2Config, evaluate_folder, load_tokenizer, save_pretrained
from pretrain_lib.evaluate.live_model import LiveModel
from pretrain_lib.evaluate.per_token import count_ending_tokens
from tests.conftest import VOCABULARY

ITEMS = 40
WORDS = ("def", "return", "self", "subparser", "the", "value", "of", "a", "xyzzy", "None", "été")
TASK = {
    "dataset_path": "json",
    "validation_split": "validation",
    "output_type": "multiple_choice",
    "doc_to_text": "context",
    "doc_to_choice": "choices",
    "doc_to_target": "label",
    "target_delimiter": " ",
    "metadata": {"version": 1.0},
}


def metric_list(*names):
    each = {"aggregation": "mean", "higher_is_better": True}
    return [{"metric": name, **each} for name in names]


@pytest.fixture(scope="module")
def place(prepared, tmp_path_factory):
    """A folder with a model, and task files over items whose endings differ in length."""
    folder = tmp_path_factory.mktemp("per_token")
    config = GPT2Config(
        vocabulary_size=VOCABULARY, context_length=64, num_layers=1, num_heads=2, width=32
    )
    model = GPT2(config).initialize(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    save_pretrained(model, folder / "model", tokenizer=load_tokenizer(prepared / "tokenizer"))
    generator = random.Random(0)

    def text(least, most):
        return " ".join(generator.choice(WORDS) for _ in range(generator.randint(least, most)))

    rows = [
        {"context": text(2, 9), "choices": [text(1, 6) for _ in range(4)], "label": i % 4}
        for i in range(ITEMS)
    ]
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TASK | {"dataset_kwargs": {"data_files": {"validation": str(folder / "items.jsonl")}}}
    named = {
        "normalised": {"metric_list": metric_list("acc", "acc_norm")},
        "informed": {"metric_list": metric_list("acc_norm", "acc_mutual_info")},
        "spelled": {
            "doc_to_target": "{{choices[label]}}",
            "metric_list": metric_list("acc_norm"),
        },
        "plain": {"metric_list": metric_list("acc")},
    }
    for name, fields in named.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task | {"task": name} | fields))
    return folder, rows


@torch.no_grad()
def choose(model, tokenizer, row):
    """Return the choices of transformers' model: by sum, by characters, by tokens."""
    found = []
    for ending in row["choices"]:
        context = tokenizer.encode(row["context"])
        whole = tokenizer.encode(f"{row['context']} {ending}")
        scores = model(torch.tensor([whole[:-1]])).logits[0].log_softmax(-1)
        nats = sum(float(scores[i - 1, whole[i]]) for i in range(len(context), len(whole)))
        found.append((nats, nats / len(ending), nats / (len(whole) - len(context))))
    return [max(range(4), key=column.__getitem__) for column in zip(*found, strict=True)]


@pytest.mark.parametrize("harness", [False, True])
def test_it_is_the_accuracy_of_transformers_scores_by_token(place, harness):
    folder, rows = place
    results = evaluate_folder(
        folder / "model",
        ["normalised", "plain"],
        include_path=folder,
        device="cpu",
        harness=harness,
        log_samples=True,
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model").double()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    chosen = [choose(model, tokenizer, row) for row in rows]
    by_sum, by_character, by_token = zip(*chosen, strict=True)
    assert by_token not in (by_sum, by_character)
    hits = [
        [float(c == row["label"]) for c, row in zip(column, rows, strict=True)]
        for column in (by_sum, by_character, by_token)
    ]
    scores = results["results"]["normalised"]
    names = ("acc", "acc_norm", "acc_norm_per_token")
    for name, column in zip(names, hits, strict=True):
        assert scores[f"{name},none"] == pytest.approx(statistics.fmean(column))
        error = statistics.stdev(column) / math.sqrt(ITEMS)
        assert scores[f"{name}_stderr,none"] == pytest.approx(error)
    samples = sorted(results["samples"]["normalised"], key=lambda sample: sample["doc_id"])
    assert [sample["acc_norm_per_token"] for sample in samples] == hits[2]
    assert results["higher_is_better"]["normalised"]["acc_norm_per_token"]
    assert not any("per_token" in key for key in results["results"]["plain"])


def test_other_ways_to_ask_change_nothing(place):
    folder, _ = place
    names = ["normalised", "informed", "spelled"]
    results = evaluate_folder(folder / "model", names, include_path=folder, device="cpu")
    assert "samples" not in results
    found = [results["results"][name]["acc_norm_per_token,none"] for name in names]
    assert found[0] == found[1] == found[2]


def test_tokens_are_counted_as_lm_eval_cuts_them(place):
    folder, rows = place
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    live = LiveModel(GPT2(GPT2Config(VOCABULARY, 8, num_layers=1, num_heads=1, width=8)), tokenizer)
    pairs = [(row["context"], " " + row["choices"][0]) for row in rows]
    pairs += [("the value  ", "of"), ("re", "turn"), ("a b", "\n  c")]
    expected = [len(live._encode_pair(*pair)[1]) for pair in pairs]
    assert count_ending_tokens(pairs, tokenizer) == expected
    assert count_ending_tokens([("", "def x")], tokenizer) == [len(tokenizer.encode("def x"))]
