"""Sampling: greedy as in transformers, the same without a cache, draws from the right set."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2LMHeadModel,
    LogitsProcessorList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from pretrain_lib import (
    GPT2,
    CausalLMAdapter,
    GPT2Config,
    HeldOut,
    Llama,
    LlamaConfig,
    choose_stretches,
    generate,
    load_tokenizer,
    open_split,
    sample_texts,
    save_pretrained,
    validate,
)
from pretrain_lib.export.check import write_expected
from pretrain_lib.models.generation import _choose
from tests.data.test_round_trip import VARIANTS

CONTEXT = 24
SHAPE = {"vocabulary_size": 61, "context_length": CONTEXT, "num_layers": 2, "width": 16}
CONFIG = GPT2Config(**SHAPE, num_heads=2)
CONFIGS = {
    "gpt2": CONFIG,
    "llama": LlamaConfig(**SHAPE, num_heads=4, num_key_value_heads=4, mlp_width=24),
    "grouped llama": LlamaConfig(**SHAPE, num_heads=4, num_key_value_heads=2, mlp_width=24),
    "qwen3": LlamaConfig(
        **SHAPE, num_heads=4, num_key_value_heads=2, mlp_width=24, head_width=8, qk_norm=True
    ),
}
PROMPTS = [[1, 2, 3], [60], [7, 7, 7, 7, 9], [5] * 8]


def random_model(config=CONFIG):
    model = (GPT2 if isinstance(config, GPT2Config) else Llama)(config).initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)  # so that the likeliest token is not the same everywhere
    return model.eval()


def without_cache(model, folder):
    """Return the same model as one of another family, which `generate` reads again every time."""
    save_pretrained(model, folder, tokenizer=None)
    return CausalLMAdapter(AutoModelForCausalLM.from_pretrained(folder).eval())


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_decoding_is_that_of_transformers(name, tmp_path):
    model = random_model(CONFIGS[name])
    save_pretrained(model, tmp_path, tokenizer=None)
    other = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    found = generate(model, PROMPTS, new_tokens=16, context_length=CONTEXT, temperature=0)
    for prompt, ids in zip(PROMPTS, found, strict=True):
        expected = other.generate(
            torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=0
        )[0, len(prompt) :]
        assert ids == expected.tolist()
    assert len(set(map(tuple, found))) == len(PROMPTS)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("options", [{}, {"top_k": 5, "temperature": 2.0}, {"top_p": 0.8}])
def test_sampling_is_that_of_a_model_without_a_cache(name, options, tmp_path):
    model = random_model(CONFIGS[name])
    options |= {"new_tokens": 40, "context_length": CONTEXT, "seed": 3, "end_of_text_id": 60}
    found = generate(model, PROMPTS, **options)  # they outgrow the context one after another
    assert found == generate(without_cache(model, tmp_path), PROMPTS, **options)
    assert max(map(len, found)) == 40


def test_each_token_is_read_once_while_all_fit(monkeypatch):
    model, read = random_model(), []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda ids, **o: (read.append(ids.shape), forward(ids, **o))[1]
    )
    generate(model, [[1, 2, 3], [4, 5]], new_tokens=4, context_length=CONTEXT)
    assert read == [(2, 3), (2, 1), (2, 1), (2, 1)]


def test_a_row_draws_the_same_whatever_else_is_in_the_batch():
    model = random_model()
    options = {"new_tokens": 12, "context_length": CONTEXT, "end_of_text_id": 17}
    together = generate(model, PROMPTS, seed=5, **options)
    for others in ([[9] * 20, [8]], [[3], [2, 1], [40, 41, 42]]):
        for row, prompt in enumerate(PROMPTS[:2]):
            batch = [*others[:row], prompt, *others[row:]]
            assert generate(model, batch, seed=5, **options)[row] == together[row]
    same = generate(model, [[1, 2, 3]] * 6, seed=5, **options)
    assert same[0] == together[0]
    assert len(set(map(tuple, same))) == 6  # and no two rows draw alike
    assert generate(model, [[1, 2, 3]] * 6, seed=6, **options) != same


def test_rows_end_by_themselves_and_slide_beyond_the_context(tmp_path):
    model = random_model()
    options = {"new_tokens": 40, "context_length": CONTEXT, "temperature": 0}
    prompts = [[1], [2, 3], [4] * 30]
    free = generate(model, prompts, **options)
    assert [len(ids) for ids in free] == [40, 40, 40]
    other = GPT2LMHeadModel.from_pretrained(without_cache(model, tmp_path) and tmp_path).eval()
    for prompt, ids in zip(prompts, free, strict=True):
        row = list(prompt)
        for token in ids:  # the likeliest after the last ids that fit
            with torch.no_grad():
                assert int(other(torch.tensor([row[-CONTEXT:]])).logits[0, -1].argmax()) == token
            row.append(token)
    end = free[0][5]
    ended = generate(model, prompts, end_of_text_id=end, **options)
    stopped = generate(model, prompts, is_done=lambda ids: end in ids, **options)
    for whole, short, done in zip(free, ended, stopped, strict=True):
        length = whole.index(end) if end in whole else 40
        assert short == whole[:length] and done == whole[: length + 1]


def test_padding_of_the_vocabulary_is_never_drawn():
    model = random_model(replace(CONFIG, vocabulary_size=3))
    with torch.no_grad():
        model.head_weight[3:] = 100 * model.head_weight[:1]  # 125 rows that would drown the others
    found = generate(model, [[1]] * 8, new_tokens=20, context_length=CONTEXT)
    assert {token for ids in found for token in ids} <= {0, 1, 2}


def test_a_prompt_without_tokens_is_refused_and_no_prompts_are_none():
    with pytest.raises(ValueError, match="each needs a token"):
        generate(random_model(), [[1], []], new_tokens=1, context_length=CONTEXT)
    assert generate(random_model(), [], new_tokens=1, context_length=CONTEXT) == []


@pytest.mark.parametrize("prompts", [[1, 2], ["def"], "def", torch.tensor([1, 2]), [[[1]]]])
def test_prompts_that_are_not_rows_of_ids_are_refused(prompts):
    with pytest.raises(ValueError, match=r"^prompts=.* must be several lists of token ids"):
        generate(random_model(), prompts, new_tokens=1, context_length=CONTEXT)
    rows, options = [[1, 2], [3, 4]], {"new_tokens": 4, "context_length": CONTEXT}
    expected = generate(random_model(), rows, **options)
    assert generate(random_model(), np.array(rows), **options) == expected
    assert generate(random_model(), torch.tensor(rows), **options) == expected


def test_a_text_or_a_tokenizer_of_another_library_is_refused(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    options = {"per_prompt": 1, "new_tokens": 1, "context_length": CONTEXT, "seed": 0}
    with pytest.raises(ValueError, match="^prompts='?def'? must be several texts"):
        sample_texts(random_model(), tokenizer, "def", **options)
    with pytest.raises(ValueError, match=r"^tokenizer is .* must be a pretrain_lib.Tokenizer"):
        sample_texts(random_model(), tokenizer.backend, ["def"], **options)


def test_a_model_in_training_mode_generates_without_dropout():
    config = replace(CONFIG, dropout=0.5)
    model, options = random_model(config), {"new_tokens": 8, "context_length": CONTEXT}
    expected = generate(model, PROMPTS, temperature=0, **options)
    model.train()
    assert generate(model, PROMPTS, temperature=0, **options) == expected
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "kept"),
    [({}, 4), ({"top_k": 2}, 2), ({"top_p": 0.7}, 2), ({"top_p": 0.4}, 1), ({"top_k": 1}, 1)],
)
def test_draws_follow_the_probabilities_of_what_is_kept(options, kept):
    probabilities = torch.tensor([0.1, 0.5, 0.15, 0.25])
    settings = {"temperature": 1.0, "top_k": None, "top_p": None} | options
    generator = torch.Generator().manual_seed(0)
    draws = Counter(
        _choose(probabilities.log(), *settings.values(), generator) for _ in range(4000)
    )
    order = probabilities.argsort(descending=True)[:kept]
    expected = probabilities[order] / probabilities[order].sum()
    assert set(draws) == set(order.tolist())
    for token, share in zip(order.tolist(), expected.tolist(), strict=True):
        assert draws[token] / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("top_k", [1, 3, 5, None])
@pytest.mark.parametrize("top_p", [0.5, 0.9, 1.0, None])
def test_what_top_k_and_top_p_keep_is_what_transformers_keeps(top_k, top_p):
    warpers = [] if top_k is None else [TopKLogitsWarper(top_k)]
    warpers += [] if top_p is None else [TopPLogitsWarper(top_p)]
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(6, generator=generator)
        kept = LogitsProcessorList(warpers)(None, logits[None])[0].isfinite().nonzero()
        draws = {_choose(logits, 1.0, top_k, top_p, generator) for _ in range(1000)}
        assert draws == set(kept.flatten().tolist())


def test_temperature_sharpens_as_the_softmax_says():
    logits, generator = torch.tensor([0.0, 1.0]), torch.Generator().manual_seed(0)
    draws = [_choose(logits, 0.5, None, None, generator) for _ in range(4000)]
    assert sum(draws) / 4000 == pytest.approx(torch.sigmoid(torch.tensor(2.0)).item(), abs=0.03)


def count_training(model):
    return [name for name, module in model.named_modules() if module.training]


@pytest.mark.parametrize("training", [True, False])
def test_each_module_keeps_its_mode_in_success_and_failure(prepared, tmp_path, training):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    shape = {**vars(CONFIG), "vocabulary_size": tokenizer.vocabulary_size}
    model = GPT2(GPT2Config(**shape)).initialize(0).train(training)
    next(model.children()).train(not training)
    before = count_training(model)
    assert 0 < len(before) < len(list(model.modules()))
    options = {"per_prompt": 1, "new_tokens": 2, "context_length": CONTEXT, "seed": 0}
    held_out = [HeldOut("all", open_split(prepared, "validation"), "")]
    long = choose_stretches(held_out, 2 * CONTEXT, max_tokens=4 * CONTEXT)
    short = choose_stretches(held_out, CONTEXT, max_tokens=4 * CONTEXT)
    accelerator = Accelerator(cpu=True)

    sample_texts(model, tokenizer, ["a"], **options)
    assert count_training(model) == before
    with pytest.raises(ValueError, match="temperature=nan"):
        sample_texts(model, tokenizer, ["a"], temperature=math.nan, **options)
    assert count_training(model) == before
    validate(accelerator, model, short, micro_batch=1)
    assert count_training(model) == before
    with pytest.raises((ValueError, IndexError, RuntimeError)):
        validate(accelerator, model, long, micro_batch=1)
    assert count_training(model) == before
    write_expected(model, tmp_path, tokenizer=None, dtype=torch.float32)
    assert count_training(model) == before


def test_samples_leave_mode_and_random_state_alone(prepared):
    tokenizer = load_tokenizer(prepared / "tokenizer")
    shape = {**vars(CONFIG), "vocabulary_size": tokenizer.vocabulary_size, "dropout": 0.5}
    model = GPT2(GPT2Config(**shape)).initialize(0).train()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    options = {"per_prompt": 2, "new_tokens": 5, "context_length": 24}
    first = sample_texts(model, tokenizer, ["def", "x ="], seed=1, **options)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert [s["prompt"] for s in first] == ["def", "def", "x =", "x ="]
    assert first == sample_texts(model, tokenizer, ["def", "x ="], seed=1, **options)
    assert first != sample_texts(model, tokenizer, ["def", "x ="], seed=2, **options)
    shares = [slice(process, None, 3) for process in range(3)]
    for rows in shares:
        some = sample_texts(model, tokenizer, ["def", "x ="], seed=1, rows=rows, **options)
        assert some == first[rows]


@pytest.mark.parametrize("name", [name for name, (_, keeps) in VARIANTS.items() if keeps])
def test_prompt_and_text_of_a_sample_are_the_text_of_all_its_ids(name):
    tokenizer, _ = VARIANTS[name]
    size = {**SHAPE, "vocabulary_size": tokenizer.vocabulary_size}
    model = GPT2(GPT2Config(**size, num_heads=2)).initialize(0)
    options = {"new_tokens": 4, "context_length": CONTEXT, "seed": 0}
    prompts = ["to be", "Größe", "not  ", ""]
    found = sample_texts(model, tokenizer, prompts, per_prompt=60, **options)
    texts = [sample["prompt"] + sample["text"] for sample in found]
    ids = [tokenizer.encode(sample["prompt"]) for sample in found]
    end = tokenizer.end_of_text_id
    new = generate(model, [[end, *row] for row in ids], end_of_text_id=end, **options)
    assert texts == [tokenizer.decode(row + more) for row, more in zip(ids, new, strict=True)]
    assert any(text.startswith("to be ") for text in texts)
    assert found[-1]["text"] == tokenizer.decode(new[-1])


def test_a_prompt_that_ends_in_a_space_gets_no_second_one(tmp_path):
    """WordPiece drops spaces, and its decoder puts one before each word."""
    words = Backend(models.WordPiece(unk_token="[UNK]"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece()
    special = ["[UNK]", "<|endoftext|>"]
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=special, show_progress=False)
    words.train_from_iterator(["def foo ( x ) : return x", "class Test : pass"], trainer)
    words.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    size = {**SHAPE, "vocabulary_size": tokenizer.vocabulary_size}
    model = GPT2(GPT2Config(**size, num_heads=2)).initialize(0)
    options = {"per_prompt": 20, "new_tokens": 4, "context_length": CONTEXT, "seed": 0}
    found = sample_texts(model, tokenizer, ["def "], **options)
    whole = [sample["prompt"] + sample["text"] for sample in found]
    assert any(text.startswith("def ") and text[4:5].strip() for text in whole)
    assert not any("def  " in text for text in whole)
