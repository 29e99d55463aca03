"""Validation: the mean over the same tokens, whatever the batches."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch
from accelerate import Accelerator
from tokenizers import models
from torch.utils.flop_counter import FlopCounterMode

from pretrain_lib import (
    GPT2,
    GPT2Config,
    HeldOut,
    Job,
    Stretch,
    choose_stretches,
    load_tokenizer,
    open_foreign,
    open_split,
    prepare,
    validate,
)

CONFIG = GPT2Config(vocabulary_size=61, context_length=16, num_layers=2, num_heads=2, width=16)


@pytest.fixture
def tokens(tmp_path):
    ids = np.random.default_rng(0).integers(61, size=16 * 9 + 5)
    np.save(tmp_path / "ids.npy", ids)
    return open_foreign(tmp_path / "ids.npy", vocabulary_size=61)


def reference_loss(model, ids, windows):
    losses = []
    for start in range(0, windows * 16, 16):
        window = torch.from_numpy(ids[start : start + 17])[None]
        with torch.no_grad():
            logits = model.double()(window[:, :-1])[0]
        losses.append(torch.nn.functional.cross_entropy(logits, window[0, 1:]))
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize(
    ("max_tokens", "windows"), [(10**9, 9), (None, 9), (16 * 5, 5), (16 * 5 + 15, 5)]
)
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_the_loss_is_the_mean_over_the_first_windows(tokens, max_tokens, windows, micro_batch):
    model = GPT2(CONFIG).initialize(0)
    (stretch,) = choose_stretches([HeldOut("all", tokens, "")], 16, max_tokens=max_tokens)
    stretch = replace(stretch, text_bytes=1000)
    result = validate(Accelerator(cpu=True), model, [stretch], micro_batch=micro_batch)
    assert model.training
    expected = reference_loss(model, tokens.read(0, len(tokens)), windows)
    assert result.loss == pytest.approx(expected, abs=1e-5)
    assert result.targets == windows * 16
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.bits_per_byte == pytest.approx(
        expected * windows * 16 / math.log(2) / 1000, rel=1e-5
    )


def test_dropout_is_off(tokens):
    (stretch,) = choose_stretches([HeldOut("all", tokens, "")], 16, max_tokens=None)
    results = []
    for dropout in (0.0, 0.5):
        model = GPT2(replace(CONFIG, dropout=dropout)).initialize(0)
        results.append(validate(Accelerator(cpu=True), model, [stretch], micro_batch=4))
    assert results[0] == results[1]


def test_in_mixed_precision_the_loss_is_that_of_torchs_autocast(tokens):
    model = GPT2(CONFIG).initialize(0)
    (stretch,) = choose_stretches([HeldOut("all", tokens, "")], 16, max_tokens=None)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    result = validate(accelerator, model, [stretch], micro_batch=9)
    ids = torch.from_numpy(tokens.read(0, 16 * 9 + 1))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        loss, count = model(ids[:-1].view(9, 16), ids[1:].view(9, 16))
    assert result.loss == loss.item() / count.item()


def test_it_multiplies_no_more_than_a_forward_does(tokens):
    model = GPT2(CONFIG).initialize(0)
    (stretch,) = choose_stretches([HeldOut("all", tokens, "")], 16, max_tokens=None)
    with FlopCounterMode(display=False) as validated:
        validate(Accelerator(cpu=True), model, [stretch], micro_batch=4)
    ids = torch.zeros(stretch.windows, 16, dtype=torch.int64)
    with torch.no_grad(), FlopCounterMode(display=False) as forward:
        model.hidden_states(ids) @ model.head_weight.T
    assert validated.get_total_flops() == forward.get_total_flops() > 0


def test_the_bytes_of_a_stretch_are_those_of_the_text_of_its_targets(prepared):
    tokens, tokenizer = open_split(prepared, "validation"), load_tokenizer(prepared / "tokenizer")
    options = {"max_tokens": 16 * 400, "tokenizer": tokenizer}
    (stretch,) = choose_stretches([HeldOut("all", tokens, "")], 16, **options)
    ids = tokens.read(1, 16 * 400).tolist()
    text = tokenizer.backend.decode(ids, skip_special_tokens=True)
    assert text.isascii()  # no character is cut
    assert stretch.text_bytes == len(text)


@pytest.mark.parametrize("kind", [models.WordPiece, models.BPE, models.WordLevel])
def test_bytes_are_not_told_by_a_tokenizer_that_does_not_give_back_the_text(tmp_path, kind):
    backend = tokenizers.Tokenizer(kind(unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    trainer = backend.model.get_trainer()
    trainer.special_tokens = [tokenizers.AddedToken(t) for t in ("<|endoftext|>", "<unk>")]
    text = "Some words, of which (some) are not it's  own. " * 50
    backend.train_from_iterator([text], trainer)
    backend.save(f"{tmp_path}/tokenizer.json")
    (tmp_path / "text.txt").write_text(text + " \u2603")
    job = Job((f"{tmp_path}/text.txt",), f"{tmp_path}/tokenizer.json", None, "first:100")
    manifest = prepare(job, tmp_path / "out", workers=1, quiet=True)
    split, tokenizer = open_split(tmp_path / "out", "train"), load_tokenizer(tmp_path)
    held_out = [HeldOut("all", split, "")]
    (stretch,) = choose_stretches(held_out, 1, max_tokens=None, tokenizer=tokenizer)
    ids = split.read(1, len(split) - 1)
    assert tokenizer.count_bytes(ids) != manifest["splits"]["train"]["text_bytes"]
    assert stretch.text_bytes is None
    model = GPT2(GPT2Config(**{**vars(CONFIG), "vocabulary_size": 512})).initialize(0)
    result = validate(Accelerator(cpu=True), model, [stretch], micro_batch=64)
    assert result.bits_per_byte is None


def test_with_document_masking_targets_of_other_documents_do_not_count(prepared):
    model = GPT2(GPT2Config(**{**vars(CONFIG), "vocabulary_size": 512})).initialize(0)
    tokens = open_split(prepared, "validation")
    stretch = Stretch("all", tokens, windows=400, sequence_length=16)
    results = [
        validate(Accelerator(cpu=True), model, [stretch], micro_batch=2, document_masking=masking)
        for masking in (False, True)
    ]
    ends = tokens.document_ends(0, 16 * 400 + 1)
    assert len(ends) > 0
    assert results[0].targets - results[1].targets == len(ends)


def test_several_texts_are_told_apart_and_read_by_weight(tokens, tmp_path):
    np.save(tmp_path / "other.npy", np.arange(16 * 20 + 1) % 61)
    other = open_foreign(tmp_path / "other.npy", vocabulary_size=61)
    texts = [HeldOut("one", tokens, ""), HeldOut("two", other, "", weight=3.0)]
    stretches = choose_stretches(texts, 16, max_tokens=16 * 16)
    assert [stretch.windows for stretch in stretches] == [4, 12]
    model = GPT2(CONFIG).initialize(0)
    result = validate(Accelerator(cpu=True), model, stretches, micro_batch=4)
    alone = [validate(Accelerator(cpu=True), model, [s], micro_batch=4) for s in stretches]
    assert [result.by_text[name] for name in ("one", "two")] == alone
    assert result.loss == pytest.approx((alone[0].loss + 3 * alone[1].loss) / 4, rel=1e-6)
    row = result.to_row()
    assert (row["loss/two"], row["targets/two"]) == (alone[1].loss, 192)


def test_windows_are_of_the_length_for_which_they_were_chosen(tokens):
    model = GPT2(CONFIG).initialize(0)
    texts = [HeldOut("all", tokens, "")]
    long, short = (choose_stretches(texts, length, max_tokens=144)[0] for length in (16, 8))
    (long, short) = (replace(stretch, text_bytes=1000) for stretch in (long, short))
    results = [validate(Accelerator(cpu=True), model, [s], micro_batch=4) for s in (long, short)]
    assert [result.targets for result in results] == [144, 144]
    for result in results:
        expected = result.loss * 144 / math.log(2) / 1000
        assert result.bits_per_byte == pytest.approx(expected, rel=1e-9)


def test_too_little_text_is_refused(tokens):
    text = HeldOut("all", tokens, "")
    with pytest.raises(ValueError, match=r"^validation\.tokens=8 is less than .*length=16; raise"):
        choose_stretches([text], 16, max_tokens=8)
    with pytest.raises(
        ValueError, match=r"^validation\.tokens=30: the share of all is 15 tokens, l"
    ):
        choose_stretches([text, text], 16, max_tokens=30)
    length = len(tokens)
    with pytest.raises(ValueError, match=f"^validation needs .*the set has {length}; hold out mo"):
        choose_stretches([text], length, max_tokens=10**6)
