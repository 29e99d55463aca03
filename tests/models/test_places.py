"""Ends of documents in every form, and caches that do not fit, in all three classes of models."""

import pytest
import torch

import pretrain_lib as pl
from pretrain_lib.models.any_model import new_cache
from pretrain_lib.models.cache import TokenTrees
from tests.families import family

SHAPE = {"vocabulary_size": 61, "context_length": 64, "num_layers": 2, "num_heads": 2, "width": 32}
MODELS = {
    "gpt2": lambda **options: pl.GPT2(pl.GPT2Config(**SHAPE, **options)),
    "llama": lambda: pl.Llama(pl.LlamaConfig(**SHAPE, num_key_value_heads=1, mlp_width=48)),
    "adapter": lambda: pl.build_model(family("olmo2")),
}
T = 24


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]().initialize(0)


def ids_of(rows, seed=0):
    return torch.randint(61, (rows, T), generator=torch.Generator().manual_seed(seed))


# Each with the documents of the two rows, as (first, end).
FORMS = {
    "one row for all": ([[5, T]], [[(0, 5), (5, T)]] * 2),
    "one row without T": ([[5, 11]], [[(0, 5), (5, 11), (11, T)]] * 2),
    "without T": ([[5], [7]], [[(0, 5), (5, T)], [(0, 7), (7, T)]]),
    "T in one row": ([[5, T], [3, 7]], [[(0, 5), (5, T)], [(0, 3), (3, 7), (7, T)]]),
    "filled up": ([[5, T, T], [3, 7, 99]], [[(0, 5), (5, T)], [(0, 3), (3, 7), (7, T)]]),
    "empty documents": ([[0, 5, 5], [4, 4, T]], [[(0, 5), (5, T)], [(0, 4), (4, T)]]),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("form", FORMS)
def test_each_document_is_read_as_if_alone(model, form, dtype):
    written, documents = FORMS[form]
    ids, ends = ids_of(2), torch.tensor(written, dtype=dtype)
    found, total = model(ids, document_ends=ends), 0.0
    for row, own in enumerate(documents):
        for first, end in own:
            part = ids[row : row + 1, first:end]
            expected = model(part)
            torch.testing.assert_close(found[row : row + 1, first:end], expected)
            total += model(part, part)[0]
    loss, count = model(ids, ids, document_ends=ends)
    torch.testing.assert_close(loss, total)
    assert count == ids.numel()
    grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    expected = torch.autograd.grad(total, list(model.parameters()))
    torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-4)


def test_the_dense_mask_of_dropout_takes_the_same_forms(monkeypatch):
    model = MODELS["gpt2"]().initialize(0)
    for written, _ in FORMS.values():
        ends = torch.tensor(written)
        found = model(ids_of(2), document_ends=ends)
        with monkeypatch.context() as patch:
            patch.setattr("pretrain_lib.models.attention.has_document_kernel", lambda _: False)
            torch.testing.assert_close(model(ids_of(2), document_ends=ends), found)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (
            [5, T],
            r"^document_ends of shape \(2,\) do not .*\(3, 24\): .* \(3, E\), or \(1, E\)",
        ),
        ([[5, T], [5, T]], r"^document_ends of shape \(2, 2\) do not fit .*$"),
        ([[7, 5, T]], r"^document_ends=\[\[7, 5, 24\]\] must ascend .*$"),
        ([[-1, 5, T]], r"^document_ends=\[\[-1, 5, 24\]\] must ascend in each row, from 0: .*$"),
    ],
)
def test_other_ends_are_refused(model, written, reason):
    with pytest.raises(ValueError, match=reason):
        model(ids_of(3), document_ends=torch.tensor(written))


def test_a_cache_is_refused_beside_documents_and_for_another_number_of_rows(model):
    ids, ends = ids_of(2), torch.tensor([[5, T]])
    cache = new_cache(model, rows=2, slots=64)
    with pytest.raises(ValueError, match=r"^document_ends cannot be given with a cache, .*$"):
        model(ids, document_ends=ends, cache=cache)
    model(ids, cache=cache)
    for rows in (1, 3):
        other = new_cache(model, rows=rows, slots=64)
        with pytest.raises(ValueError, match=rf"^the cache has rows={rows}, input_ids have 2 seq"):
            model(ids, cache=other)
    if isinstance(model, pl.CausalLMAdapter):
        return
    with pytest.raises(ValueError, match=r"^24 tokens do not fit into a cache of slots=8$"):
        model(ids, cache=new_cache(model, rows=2, slots=8))
    trees = TokenTrees(
        model.config, depths=torch.arange(T)[None], ends=torch.full((1, T), T, dtype=torch.int64)
    )
    with pytest.raises(ValueError, match="^the cache has rows=1, input_ids have 2 sequences"):
        model(ids, cache=trees)
