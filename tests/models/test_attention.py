"""Attention equals a softmax written by hand; packed documents do not see each other."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library

from pretrain_lib.models import document_attention
from pretrain_lib.models.attention import (
    causal_attention,
    document_index,
    document_positions,
)
from pretrain_lib.models.document_attention import document_boundaries
from pretrain_lib.models.gpt2 import GPT2, GPT2Config
from pretrain_lib.models.llama import Llama, LlamaConfig

SHAPE = {"vocabulary_size": 61, "context_length": 32, "num_layers": 2, "num_heads": 4, "width": 32}


@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    """A small model with random weights."""
    if request.param == "gpt2":
        return GPT2(GPT2Config(**SHAPE)).initialize(0).eval()
    return Llama(LlamaConfig(**SHAPE, num_key_value_heads=2, mlp_width=48)).initialize(0).eval()


@st.composite
def packed_rows(draw):
    """Return the lengths of the documents of some rows, all rows of one length."""
    length = draw(st.integers(1, 24))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        cuts = draw(st.sets(st.integers(1, length), max_size=6)) | {length}
        ends = sorted(cuts)
        rows.append([end - start for start, end in zip([0, *ends], ends, strict=False)])
    return length, rows


def ends_tensor(rows, length, filling=0, dtype=torch.int64):
    """Return document_ends (B, E) of rows of document lengths, filled up with `length` or more."""
    ends = [torch.tensor(row).cumsum(0).tolist() for row in rows]
    most = max(map(len, ends)) + 2
    return torch.tensor([row + [length + filling] * (most - len(row)) for row in ends], dtype=dtype)


def by_hand(q, k, v, document):
    """Softmax attention in float64, one query at a time."""
    q, k, v = q.double(), k.double(), v.double()
    batch, heads, length, width = q.shape
    group = heads // k.shape[1]
    out = torch.zeros_like(q)
    for b in range(batch):
        for t in range(length):
            visible = [s for s in range(t + 1) if document[b][s] == document[b][t]]
            for h in range(heads):
                scores = k[b, h // group, visible] @ q[b, h, t] / width**0.5
                weights = scores.exp() / scores.exp().sum()
                out[b, h, t] = weights @ v[b, h // group, visible]
    return out


@given(
    packed=packed_rows(),
    groups=st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]),
    with_documents=st.booleans(),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=40, deadline=None)
def test_attention_equals_a_softmax_by_hand(packed, groups, with_documents, seed):
    length, rows = packed
    heads, key_value_heads = groups
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(len(rows), heads, length, 6, generator=generator)
    k, v = torch.randn(2, len(rows), key_value_heads, length, 6, generator=generator)
    boundaries, document = None, [[0] * length for _ in rows]
    if with_documents:
        boundaries = document_boundaries(ends_tensor(rows, length), length)
        document = [[i for i, size in enumerate(row) for _ in range(size)] for row in rows]
    result = causal_attention(q, k, v, boundaries=boundaries)
    torch.testing.assert_close(result.double(), by_hand(q, k, v, document), rtol=1e-5, atol=1e-5)


@given(
    packed=packed_rows(),
    filling=st.integers(0, 5),
    dtype=st.sampled_from([torch.int32, torch.int64]),
)
@settings(max_examples=150, deadline=None)
def test_document_index_and_positions_equal_a_count(packed, filling, dtype):
    length, rows = packed
    ends = ends_tensor(rows, length, filling, dtype)
    index = [[i for i, size in enumerate(row) for _ in range(size)] for row in rows]
    positions = [[t for size in row for t in range(size)] for row in rows]
    assert document_index(ends, length).tolist() == index
    assert document_positions(ends, length).tolist() == positions
    assert document_index(ends, length).dtype == torch.int64
    assert document_positions(ends, length).dtype == torch.int64


def test_one_document_over_the_whole_window_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 20, 8, generator=generator)
    whole = causal_attention(
        q, k, v, boundaries=document_boundaries(torch.tensor([[20], [25]]), 20)
    )
    torch.testing.assert_close(whole, causal_attention(q, k, v))


def test_isolation_holds_across_the_blocks_of_long_windows():
    generator = torch.Generator().manual_seed(1)
    length, cut = 1200, 1037  # whole blocks of keys lie in the other document
    q, k, v = torch.randn(3, 1, 1, length, 8, generator=generator)
    packed = causal_attention(
        q, k, v, boundaries=document_boundaries(torch.tensor([[cut, length]]), length)
    )
    alone = causal_attention(q[:, :, cut:], k[:, :, cut:], v[:, :, cut:])
    torch.testing.assert_close(packed[:, :, cut:], alone, rtol=1e-5, atol=1e-5)
    k[:, :, :cut], v[:, :, :cut] = 1e4, -1e4
    again = causal_attention(
        q, k, v, boundaries=document_boundaries(torch.tensor([[cut, length]]), length)
    )
    assert torch.equal(packed[:, :, cut:], again[:, :, cut:])


@torch.no_grad()
def test_changing_one_document_leaves_the_logits_of_the_others_bit_equal(model):
    spans = [(0, 7), (7, 8), (8, 19), (19, 24)]
    ends = torch.tensor([[7, 8, 19, 24, 24, 24]]).expand(2, -1)
    ids = torch.randint(61, (2, 24), generator=torch.Generator().manual_seed(2))
    logits = model(ids, document_ends=ends)
    for start, stop in spans:
        changed = ids.clone()
        changed[:, start:stop] = (changed[:, start:stop] + 1) % 61
        difference = (model(changed, document_ends=ends) != logits).flatten(2).any(-1)
        inside = torch.zeros(24, dtype=torch.bool)
        inside[start:stop] = True
        assert not difference[:, ~inside].any()
        assert difference[:, inside].all()
        # Without the document table the same change is seen by all that follows.
        assert (model(changed) != model(ids)).any(-1)[:, start:].all()


@torch.no_grad()
def test_a_packed_document_has_the_logits_it_has_alone(model):
    rows = [[5, 1, 18], [24], [11, 13]]
    ids = torch.randint(61, (3, 24), generator=torch.Generator().manual_seed(3))
    packed = model(ids, document_ends=ends_tensor(rows, 24, filling=1))
    for row, sizes in enumerate(rows):
        start = 0
        for size in sizes:
            alone = model(ids[row : row + 1, start : start + size])
            torch.testing.assert_close(
                packed[row, start : start + size], alone[0], rtol=1e-5, atol=1e-5
            )
            start += size


@torch.no_grad()
def test_logits_do_not_depend_on_later_tokens(model):
    ids = torch.randint(61, (1, 24), generator=torch.Generator().manual_seed(4))
    changed = ids.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 61
    assert torch.equal(model(ids)[:, :10], model(changed)[:, :10])
    assert (model(ids)[:, 10:] != model(changed)[:, 10:]).any(-1).all()


@given(packed=packed_rows(), groups=st.sampled_from([(4, 4), (4, 2)]), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_gradients_within_documents_equal_those_of_a_dense_mask(packed, groups, seed):
    length, rows = packed
    heads, key_value_heads = groups
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    q = torch.randn(len(rows), heads, length, 6, **options).requires_grad_()
    k, v = (
        torch.randn(len(rows), key_value_heads, length, 6, **options).requires_grad_()
        for _ in range(2)
    )
    out_grad = torch.randn(q.shape, **options)
    ends = ends_tensor(rows, length, filling=2)
    document = document_index(ends, length)
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    expected = torch.autograd.grad(dense, (q, k, v), out_grad)
    found = torch.autograd.grad(
        causal_attention(q, k, v, boundaries=document_boundaries(ends, length)), (q, k, v), out_grad
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_operator_keeps_what_it_promises_to_the_compiler():
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(2, 3, 12, 8, generator=generator).requires_grad_() for _ in range(3))
    boundaries = document_boundaries(torch.tensor([[5, 12, 12], [1, 4, 12]]), 12)
    library.opcheck(torch.ops.pretrain_lib.document_attention, (q, k, v, boundaries))


def test_with_dropout_documents_are_kept_apart_all_the_same():
    generator = torch.Generator().manual_seed(7)
    q, k, v = torch.randn(3, 1, 2, 10, 8, generator=generator)
    ends = torch.tensor([[4, 10]])
    torch.manual_seed(0)
    packed = causal_attention(q, k, v, boundaries=document_boundaries(ends, 10), dropout=0.5)
    k[:, :, :4], v[:, :, :4] = 9.0, -9.0
    torch.manual_seed(0)
    again = causal_attention(q, k, v, boundaries=document_boundaries(ends, 10), dropout=0.5)
    assert torch.equal(packed[:, :, 4:], again[:, :, 4:])
    assert not torch.equal(packed[:, :, :4], again[:, :, :4])


@pytest.mark.parametrize("ends", [None, [[5, 12]]])
def test_dropout_drops_and_leaves_attention_causal(ends):
    q, k, v = torch.randn(3, 1, 2, 12, 4, generator=torch.Generator().manual_seed(8))
    boundaries = ends and document_boundaries(torch.tensor(ends), 12)

    def attend(v, dropout):
        torch.manual_seed(0)
        return causal_attention(q, k, v, boundaries=boundaries, dropout=dropout)

    dropped = attend(v, 0.5)
    assert not torch.allclose(dropped, attend(v, 0.0))
    later = v.clone()
    later[:, :, 9] += 100
    assert torch.equal(attend(later, 0.5)[:, :, :9], dropped[:, :, :9])


def test_ends_beyond_the_window_become_empty_documents():
    boundaries = document_boundaries(torch.tensor([[5, 40], [3, 12]]), 12)
    assert boundaries.tolist() == [0, 5, 12, 12, 12 + 3, 24, 24]


def test_any_number_of_documents_is_one_graph_on_cuda(monkeypatch):
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    def attend(q, k, v, starts, ends, *lengths, is_causal, enable_gqa=False):
        return q + starts.sum()

    monkeypatch.setattr(document_attention, "varlen_attn", attend)
    torch.compiler.reset()
    compiled = torch.compile(document_attention._attend_on_cuda, backend=count, fullgraph=True)
    q, k, v = torch.zeros(3, 4, 2, 64, 8)
    for documents in (16, 4, 1, 64, 2, 32):
        compiled(q, k, v, torch.zeros(4 * documents + 1, dtype=torch.int32), grouped=False)
    assert len(graphs) == 2  # of the first number, and of any
