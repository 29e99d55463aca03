"""Files of tensors: what safetensors reads is what was written."""

import hypothesis.strategies as st
import torch
import xxhash
from hypothesis import given, settings
from safetensors import safe_open
from safetensors.torch import load_file

from pretrain_lib.tensors.files import CHUNK_BYTES, DTYPES, hash_file, write_tensors


def tensors_of(shapes_and_kinds):
    generator = torch.Generator().manual_seed(0)
    return {
        f"tensor.{number}": (100 * torch.randn(shape, generator=generator)).to(kind)
        for number, (shape, kind) in enumerate(shapes_and_kinds)
    }


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 5), max_size=3).map(tuple),
            st.sampled_from(sorted(DTYPES, key=str)),
        ),
        max_size=6,
    )
)
def test_safetensors_reads_what_was_written(tmp_path_factory, shapes_and_kinds):
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    tensors = tensors_of(shapes_and_kinds)
    digest = write_tensors(path, tensors)
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    assert digest == hash_file(path) == xxhash.xxh3_128_hexdigest(path.read_bytes())


def test_views_are_written_as_they_are_seen_in_the_wanted_type(tmp_path):
    matrix = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    views = {"transposed": matrix.t(), "rows": matrix[:3], "number": matrix[0, 0]}
    path = tmp_path / "file.safetensors"
    write_tensors(path, views, dtype=torch.bfloat16, metadata={"format": "pt"})
    found = load_file(path)
    for name, view in views.items():
        assert torch.equal(found[name], view.to(torch.bfloat16))
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_tensor_larger_than_what_is_written_at_once(tmp_path):
    large = torch.arange(CHUNK_BYTES // 4 + 3, dtype=torch.float32)
    digest = write_tensors(tmp_path / "file.safetensors", {"large": large})
    assert torch.equal(load_file(tmp_path / "file.safetensors")["large"], large)
    assert digest == hash_file(tmp_path / "file.safetensors")
