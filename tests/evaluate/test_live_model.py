"""Scores of a model in memory: those of lm-eval's own HFLM on the folder that it is saved to."""

import random

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

from pretrain_lib import (
    GPT2,
    GPT2Config,
    Llama,
    LlamaConfig,
    evaluate_folder,
    evaluate_model,
    load_tokenizer,
    open_tasks,
    save_pretrained,
)
from pretrain_lib.evaluate.item_faults import named_by_harness
from pretrain_lib.evaluate.live_model import LiveModel, transformers_tokenizer
from pretrain_lib.evaluate.local_tasks import write_local_tasks
from pretrain_lib.evaluate.prefix_trees import grow_trees
from pretrain_lib.evaluate.scoring import score_endings
from pretrain_lib.evaluate.tasks import find_tasks
from tests.conftest import VOCABULARY

pytestmark = pytest.mark.moderate

CONTEXT = 40
SHAPE = {"vocabulary_size": VOCABULARY, "context_length": CONTEXT, "num_layers": 2, "num_heads": 4}
CONFIGS = {
    "gpt2": GPT2Config(**SHAPE, width=32, dropout=0.5),
    "llama": LlamaConfig(**SHAPE, width=32, num_key_value_heads=2, mlp_width=48),
    "qwen3": LlamaConfig(
        **SHAPE, width=32, num_key_value_heads=2, mlp_width=48, head_width=16, qk_norm=True
    ),
}
WORDS = ("def", "return", "self", "argument", "the", "value", "of", "a", "<|endoftext|>", "None")


def build(config):
    model = (GPT2 if isinstance(config, GPT2Config) else Llama)(config).initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # or all endings would be nearly as likely
    return model.train()


@pytest.fixture(scope="module", params=CONFIGS)
def place(request, prepared, tmp_path_factory):
    """A model, its tokenizer, and the folder they are saved to."""
    tokenizer = load_tokenizer(prepared / "tokenizer")
    model, folder = build(CONFIGS[request.param]), tmp_path_factory.mktemp("live")
    save_pretrained(model, folder, tokenizer=tokenizer)
    return model, tokenizer, folder


@pytest.fixture(scope="module")
def live(place):
    model, tokenizer, _ = place
    return LiveModel(model, transformers_tokenizer(tokenizer), batch_size=3)


@pytest.fixture(scope="module")
def hflm(place):
    return HFLM(pretrained=str(place[2]), device="cpu", dtype="float32", batch_size=4)


@pytest.fixture(scope="module")
def tasks(prepared, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    sizes = {"context_characters": 60, "ending_characters": 30, "document_characters": 200}
    write_local_tasks(prepared, folder, items=6, **sizes)
    return folder


def instances(kind, arguments):
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def text(generator, words):
    return " ".join(generator.choice(WORDS) for _ in range(words))


def requests():
    """Contexts of all lengths with endings that share them, in no order."""
    generator, found = random.Random(0), []
    for words in (1, 2, 4, 7, 9, 12, 14, 25, 60):
        context = text(generator, words)
        found += [(context, " " + text(generator, generator.randint(1, 8))) for _ in range(3)]
        found += [(context, " a"), (context + "  ", text(generator, 2))]
    found += [("", text(generator, 3)), ("", "<|endoftext|>def"), ("<|endoftext|>a b", " c")]
    generator.shuffle(found)
    return found


def test_log_likelihoods_are_those_of_hflm(live, hflm):
    asked = instances("loglikelihood", requests())
    pairs = [live._encode_pair(*pair) for pair in requests() if pair[0]]
    assert any(len(context + ending) > CONTEXT + 1 for context, ending in pairs)
    trees = grow_trees(pairs, live.model.config)
    assert max(len(tree.endings) for tree in trees) > 3  # read once; others are rows of their own
    expected, found = hflm.loglikelihood(asked), live.loglikelihood(asked)
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_greedy_endings_are_known(live, hflm):
    asked = []
    for length in (1, 5, 12, 30):
        ids = torch.arange(length)[None]
        whole = hflm.model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
        context, ending = whole[0, :length].tolist(), whole[0, length:].tolist()
        other = [*ending[:3], (ending[3] + 1) % VOCABULARY]
        asked += [(None, context, e) for e in (ending, other, ending[:2], ending[1:])]
    expected, found = hflm._loglikelihood_tokens(asked), live._loglikelihood_tokens(asked)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [greedy for _, greedy in found][:3] == [True, False, True]


def test_rolling_log_likelihoods_are_those_of_hflm(live, hflm):
    generator = random.Random(1)
    texts = [(text(generator, words),) for words in (1, 5, 30, 120, 33)]
    asked = instances("loglikelihood_rolling", texts)
    expected, found = hflm.loglikelihood_rolling(asked), live.loglikelihood_rolling(asked)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-3)
    assert max(len(live.tok_encode(each)) for (each,) in texts) > 3 * CONTEXT


def test_generated_texts_are_those_of_hflm(live, hflm):
    generator = random.Random(2)
    settings = [{"until": ["e"], "max_gen_toks": 12}, {"until": ["zz", "\n"], "max_gen_toks": 7}]
    asked = instances(
        "generate_until",
        [(text(generator, words), each) for words in (1, 3, 6, 40) for each in settings],
    )
    expected, found = hflm.generate_until(asked), live.generate_until(asked)
    assert found == expected
    assert len(set(found)) > 3


def test_generation_settings_that_are_not_known_are_refused(live):
    for settings, what in (({"num_beams": 2}, "eval --harness"), ({"max_gen_toks": 99}, "less")):
        known, other = (("a", {"until": []} | each) for each in ({"max_gen_toks": 1}, settings))
        asked = [
            Instance("generate_until", {}, each, number, ("riddles", 7 + number, 1))
            for number, each in enumerate((known, other, other))
        ]
        message = f"task riddles, item 8: generation_kwargs=.*{next(iter(settings))}.*{what}"
        with pytest.raises(ValueError, match=message):
            live.generate_until(asked)


def test_what_cannot_be_scored_is_refused_with_its_task_and_item(live, hflm):
    long = "a b c " * CONTEXT
    asked = [
        Instance("loglikelihood", {}, each, 0, ("riddles", number, 1))
        for number, each in enumerate([("a", " b"), ("a", f" {long}")])
    ]
    message = r"task riddles, item 1 has .* tokens to score, .*1 to 40"
    for model in (live, hflm):
        with named_by_harness(), pytest.raises(ValueError, match=message):
            model.loglikelihood(asked)


def test_sampled_texts_of_one_context_differ_and_come_again(live):
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True, "temperature": 1.0}
    asked = instances("generate_until", [("def", settings)] * 7)
    found = live.generate_until(asked)
    assert len(set(found)) == 7
    assert found == live.generate_until(asked)


def test_what_is_shared_is_read_once_and_contexts_have_no_logits(place, monkeypatch):
    model, read, headed = place[0].eval(), [], []
    inner, product = model.hidden_states, torch.mm
    monkeypatch.setattr(
        model,
        "hidden_states",
        lambda ids, *a, **o: (read.append(ids.shape), inner(ids, *a, **o))[1],
    )

    def mm(x, weight, **options):
        headed.append(len(x))
        return product(x, weight, **options)

    monkeypatch.setattr("pretrain_lib.evaluate.scoring.torch.mm", mm)
    context = [*range(20)]
    asked = [(context, [5, 6, 7]), (context, [5, 9, 10]), ([*range(9, 39)], [1, 2])]
    assert len(list(score_endings(model, asked, batch_size=1))) == 3
    model.train()
    assert sorted(read) == [(1, 20 + 3), (1, 31)]
    assert sorted(headed) == [2, 4]


@pytest.mark.parametrize("request_", [([], [1]), ([1], []), ([1], [1] * (CONTEXT + 1))])
def test_what_cannot_be_scored_is_refused(place, request_):
    with pytest.raises(ValueError, match=f"request 0 .* 1 to {CONTEXT} "):
        list(score_endings(place[0], [request_], batch_size=1))


def states():
    generators = random.getstate(), np.random.get_state()[1].tolist()
    return *generators, torch.get_rng_state().tolist()


def test_the_model_and_the_random_numbers_stay_as_they_were(place, live, tasks):
    model, tokenizer, _ = place
    model.zero_grad()
    loss, _ = model(torch.arange(8)[None], torch.arange(8)[None])
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    opened = open_tasks(["heldout_choice", "heldout_perplexity"], include_path=tasks)
    before = states()
    results = evaluate_model(model, tokenizer, opened, limit=3)
    assert states() == before
    live.generate_until(instances("generate_until", [("def", {"until": [], "max_gen_toks": 4})]))
    assert states() == before
    assert all(module.training for module in model.modules())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name])
        assert torch.equal(parameter, weights[name])
    assert results["n-samples"]["heldout_choice"]["effective"] == 3


def test_a_model_a_folder_and_the_harness_agree(place, tasks):
    model, tokenizer, folder = place
    names = ["heldout_choice", "heldout_perplexity"]
    options = {"include_path": tasks, "log_samples": True}
    opened = open_tasks(names, include_path=tasks)
    runs = [
        evaluate_model(model, tokenizer, opened, log_samples=True),
        evaluate_folder(folder, names, device="cpu", **options),
        evaluate_folder(folder, names, device="cpu", harness=True, **options),
    ]
    ours, ours_of_folder, theirs = runs
    assert ours.keys() == ours_of_folder.keys() == theirs.keys()
    assert ours["results"] == ours_of_folder["results"]
    for run in runs:
        for key in ("model_num_parameters", "model_dtype"):
            assert run["config"][key] == theirs["config"][key]
        for key in ("versions", "n-shot", "n-samples", "max_length", "eot_token_id"):
            assert run[key] == theirs[key], key
    for task in names:
        expected = {k: v for k, v in theirs["results"][task].items() if not isinstance(v, str)}
        found = {metric: ours["results"][task][metric] for metric in expected}
        assert found == pytest.approx(expected, rel=1e-5) and len(found) > 2
    scores = [[r[0] for s in run["samples"]["heldout_choice"] for r in s["resps"]] for run in runs]
    for own in scores[:2]:
        expected = [nats for nats, _ in scores[2]]
        assert [nats for nats, _ in own] == pytest.approx(expected, abs=1e-3)
        assert [greedy for _, greedy in own] == [greedy for _, greedy in scores[2]]


def test_an_instance_serves_lm_eval_itself(live, hflm, tasks):
    manager, names = find_tasks(["heldout_choice"], include_path=tasks)
    scores = [
        simple_evaluate(model=each, tasks=names, task_manager=manager, bootstrap_iters=0)["results"]
        for each in (live, hflm)
    ]
    assert scores[0] == scores[1]
