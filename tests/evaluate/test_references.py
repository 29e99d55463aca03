"""Suites and published scores: tasks that lm-eval knows, figures that name where they were read."""

import math

import pytest

from pretrain_lib import GPT2, GPT2Config, save_pretrained, train_tokenizer
from pretrain_lib.evaluate.per_token import BESIDE, METRIC
from pretrain_lib.evaluate.references import figures, find_figure, models_near
from pretrain_lib.evaluate.results import format_table
from pretrain_lib.evaluate.suites import SUITES
from tests.conftest import ROOT, run_command, run_pretrain

OWN = ("validation", "loss")  # not a task of lm-eval: the recipe's validation


@pytest.mark.slow
def test_lm_eval_knows_every_task_and_metric():
    from lm_eval.tasks._yaml_loader import load_yaml

    from pretrain_lib.evaluate.tasks import _all_of_lm_eval

    manager = _all_of_lm_eval(None)
    metrics = {}
    for suite, tasks in SUITES.items():
        assert set(tasks) <= set(manager.all_subtasks), suite
        for task in tasks:
            config = load_yaml(manager.task_index[task].yaml_path, resolve_func=False)
            metrics[task] = {each["metric"] for each in config["metric_list"]}
            if BESIDE in metrics[task]:
                metrics[task].add(METRIC)
    for figure in figures():
        if (figure.task, figure.metric) != OWN:
            assert figure.metric in metrics[figure.task], figure


def test_the_larger_suite_adds_to_the_smaller():
    small, large = SUITES["gpt2_124m"], SUITES["llama_1_3b"]
    assert small == ("hellaswag", "lambada_openai", "piqa", "arc_easy", "winogrande", "wikitext")
    assert large == (*small, "arc_challenge", "openbookqa", "boolq", "sciq")


def test_every_figure_names_its_source_once():
    names = [(f.model, f.task, f.metric, f.shots) for f in figures()]
    assert len(set(names)) == len(names) > 60
    for figure in figures():
        assert figure.source.title and figure.source.note, figure
        assert figure.source.url.startswith("https://"), figure
        share = figure.metric.startswith("acc")
        assert 0 < figure.value < (1 if share else math.inf), figure
        assert figure.shots == 0  # the table says so of all


def test_figures_that_were_read_elsewhere():
    # build-nanogpt, hellaswag.py and play.ipynb; pythia, evals; TinyLlama, EVAL.md.
    known = {
        ("GPT-2 124M", "hellaswag", "acc_norm"): 0.3114,
        ("GPT-2 124M", "hellaswag", "acc_norm_per_token"): 0.294463,
        ("GPT-3 125M", "hellaswag", "acc_norm_per_token"): 0.337,
        ("GPT-2 124M", "validation", "loss"): 3.2924,
        ("Pythia-160M", "arc_easy", "acc"): 0.4352,
        ("TinyLlama-1.1B", "boolq", "acc"): 0.5783,
    }
    for name, value in known.items():
        assert find_figure(*name).value == value
    assert find_figure("GPT-2 124M", "hellaswag", "acc_norm", shots=10) is None
    assert find_figure("OPT-125M", "hellaswag", "acc_norm") is None  # none was found


def test_models_are_compared_with_those_of_their_size():
    small = ["GPT-2 124M", "GPT-3 125M", "OPT-125M", "Pythia-160M"]
    assert models_near(124_439_808) == small
    large = ["GPT-2 XL", "GPT-3 1.3B", "OPT-1.3B", "Pythia-1.4B", "TinyLlama-1.1B"]
    assert models_near(1_266_780_160) == large


def results_of(parameters, shots=0):
    scores = {"acc,none": 0.3, "acc_stderr,none": 0.0045, "acc_norm,none": 0.4}
    scores |= {
        "acc_norm_stderr,none": 0.0049,
        "acc_norm_per_token,none": 0.35,
        "alias": "hellaswag",
    }
    return {
        "results": {"hellaswag": scores, "own": {"acc,none": 0.5, "acc_stderr,none": "N/A"}},
        "n-shot": {"hellaswag": shots, "own": 0},
        "config": {"model_num_parameters": parameters},
    }


def test_the_table_sets_published_scores_beside_ours():
    header, *rows = format_table(results_of(124_439_808)).splitlines()
    assert " ".join(header.split()) == "task metric value stderr GPT-2 124M GPT-3 125M"
    assert rows[0].split() == ["hellaswag", "acc", "0.3000", "0.0045", "0.2892", "a"]
    assert rows[1].split() == ["hellaswag", "acc_norm", "0.4000", "0.0049", "0.3114", "a"]
    assert " ".join(rows[2].split()) == "hellaswag acc_norm_per_token 0.3500 0.2945 b 0.3370 c"
    assert rows[3].split() == ["own", "acc", "0.5000"]
    assert [row.split(";")[-1].split("/")[-1] for row in rows[5:]] == [
        "hellaswag.py",
        "play.ipynb",
        "play.ipynb",
    ]


def test_a_score_with_examples_stands_beside_no_score_without():
    assert "GPT-2" not in format_table(results_of(124_439_808, shots=5))


def readme_lines():
    """Return the table of published scores as recipes/README.md shows it, and its sources."""
    scores = [f for f in figures() if (f.task, f.metric) != OWN]
    models = list(dict.fromkeys(figure.model for figure in scores))
    sources = list(dict.fromkeys(figure.source for figure in scores))
    yield f"| | {' | '.join(models)} |"
    yield "|---" * (len(models) + 1) + "|"
    places = {(f.task, f.metric): f for f in scores}
    for task in SUITES["llama_1_3b"]:
        for metric in [metric for other, metric in places if other == task]:
            cells = []
            for model in models:
                figure = find_figure(model, task, metric)
                letter = "abcdefghijklmn"[sources.index(figure.source)] if figure else ""
                cells.append(f"{figure.value:g} {letter}" if figure else "")
            yield f"| {task} {metric} | {' | '.join(cells)} |"
    for letter, source in zip("abcdefghijklmn", sources, strict=False):
        yield f"- {letter}: [{source.title}]({source.url}); {source.note}"


def test_the_readme_of_the_recipes_shows_every_figure():
    text = (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")
    lines = list(readme_lines())
    table = [line for line in lines if line.startswith("|")]
    assert "\n".join(table) in text
    assert "\n".join(lines[len(table) :]) in text


@pytest.mark.slow
def test_a_suite_stands_for_its_tasks(tmp_path):
    config = GPT2Config(vocabulary_size=300, num_layers=1, num_heads=1, width=8)
    tokenizer = train_tokenizer(["some words of a text"] * 100, vocabulary_size=300)
    save_pretrained(GPT2(config).initialize(0), tmp_path, tokenizer=tokenizer)
    result = run_command(
        *("pretrain", "eval", tmp_path, "--suite", "llama_1_3b"),
        environment={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")},
    )
    assert result.returncode == 2, result.stderr
    tasks = ",".join(SUITES["llama_1_3b"])
    assert f"--tasks {tasks}: the data is neither in the cache" in result.stderr
    both = run_pretrain("eval", tmp_path, "--suite", "gpt2_124m", "--tasks", "piqa")
    assert both.returncode == 2 and "not allowed with" in both.stderr
