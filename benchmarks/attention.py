"""Attention over packed documents, forward and backward, against plain causal attention.

Every process runs one case; repetitions go round all of them. What each row means stands in
`README.md`.
"""

import argparse
import random
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from contenders import DTYPES, device, measure_calls
from measuring import Row, begin, build_parser, in_turn, ready, run_child, write_report

from pretrain_lib.data.windows.document_ends import narrow_document_ends
from pretrain_lib.models.attention import causal_attention, document_index
from pretrain_lib.models.document_attention import document_boundaries

SHAPE = (2, 12, 64)  # B, H, D of GPT-2
LENGTHS = (64, 128, 256, 512, 1024, 2048)
RANDOM_MEAN = 300  # tokens of a document, exponentially distributed: many short, a few long
CALLS = 5  # that are timed in a process, after one that is not
CAUSAL, DENSE = "causal", "dense mask"
# Against plain causal attention: short documents are not to cost more, others hardly more.
GOALS = {"documents of 256": "ratio <= 1", "documents of 2048": "ratio <= 1.05"}
GOALS |= {"documents at random": "ratio <= 1"}


def cut_even(length: int, document: int) -> list[int]:
    """Return the ends of documents that are all as long, the last cut short."""
    return [min(end, length) for end in range(document, length + document, document)]


def cut_random(length: int, generator: random.Random) -> list[int]:
    """Return the ends of documents of random lengths."""
    ends = [0]
    while ends[-1] < length:
        ends.append(min(length, ends[-1] + 1 + int(generator.expovariate(1 / RANDOM_MEAN))))
    return ends[1:]


def build_layouts(length: int) -> dict[str, list[list[int]] | None]:
    """Return the ends of the documents of each sequence, by what the case is called."""
    generator, sequences = random.Random(0), range(SHAPE[0])
    layouts: dict[str, list[list[int]] | None] = {CAUSAL: None}
    for document in LENGTHS:
        if document <= length:
            layouts[f"documents of {document}"] = [cut_even(length, document) for _ in sequences]
    layouts["documents at random"] = [cut_random(length, generator) for _ in sequences]
    return layouts | {DENSE: layouts["documents at random"]}


def dense_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, document_ends: torch.Tensor
) -> torch.Tensor:
    """Attend by a mask of all pairs, which is what a script without kernels of its own does."""
    document = document_index(document_ends, q.shape[2])
    mask = (document[:, :, None] == document[:, None, :]).tril()[:, None]  # (B, 1, T, T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def measure_case(name: str, length: int, dtype: str) -> dict[str, float]:
    """Return the median seconds of a call, and by how many MB it grows the process at most."""
    where = device()
    call = build_call(name, length, DTYPES[dtype], where)
    ready()
    return measure_calls(call, where, CALLS)


def build_call(
    name: str, length: int, dtype: torch.dtype, where: torch.device
) -> Callable[[], None]:
    """Return a call of forward and backward, which drops the gradients and waits for the device."""
    batch, heads, width = SHAPE
    options = {"dtype": dtype, "device": where, "requires_grad": True}
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, heads, length, width, **options) for _ in range(3))
    output_grad = torch.randn(batch, heads, length, width, dtype=dtype, device=where)
    layout, options = build_layouts(length)[name], {}
    if layout is not None:
        filled = [row + [length] * (length - len(row)) for row in layout]
        batch = narrow_document_ends({"document_ends": torch.tensor(filled)})
        ends = batch["document_ends"].to(where)
        options = {"boundaries": document_boundaries(ends, length)}
    attend = causal_attention
    if name == DENSE:
        attend, options = dense_attention, {"document_ends": ends}

    def call() -> None:
        attend(q, k, v, **options).backward(output_grad)
        q.grad[0, 0, 0, 0].item()
        q.grad = k.grad = v.grad = None

    return call


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows."""
    names = [*build_layouts(options.length)]

    def run(name: str) -> dict[str, float]:
        return run_child(measure_case, name, options.length, options.dtype)[0]

    results = in_turn({name: lambda name=name: run(name) for name in names}, options.repeat)
    for section, key, unit in (("seconds", "seconds", "s"), ("memory", "peak_mb", "MB")):
        values = {name: [result[key] for result in results[name]] for name in names}
        for name in names:
            goal = GOALS.get(name, "") if section == "seconds" else ""
            yield Row(section, name, unit, values[name], values[CAUSAL], goal)


HEADERS = {
    "seconds": "Forward and backward: seconds, and times plain causal attention",
    "memory": "Memory that it adds: MB at most, and times plain causal attention",
}


def main() -> None:
    """Measure attention and write the results."""
    parser = build_parser(main.__doc__, f"attention_{device().type}")
    parser.add_argument("--length", type=int, default=2048, help="positions (T)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    options = parser.parse_args()
    write_report(measure(options), options, headers=HEADERS)


if __name__ == "__main__":
    begin(main)
