"""The head and its cross-entropy, forward and backward: seconds and the memory they add.

Every process runs one way of computing it in one dtype; repetitions go round all of them. What
each row means stands in `README.md`.
"""

import argparse
import importlib.util
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from contenders import DTYPES, device, measure_calls
from measuring import (
    Row,
    begin,
    build_parser,
    in_turn,
    ready,
    run_child,
    write_report,
)

from pretrain_lib.models.loss import linear_cross_entropy

WIDTH, VOCABULARY, PADDED = 768, 50257, 50304  # of GPT-2
CALLS = 2  # that are timed in a process, after one that is not
FLOOR, PLAIN, OURS = "three matrix products", "plain head", "ours"

# Hidden states (N, D) and weight (V, D) in fp32 and targets (N,) to a mean loss.
Head = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute it as our models do."""
    loss, count = linear_cross_entropy(hidden, weight, targets, vocabulary_size=VOCABULARY)
    return loss / count


def plain(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute it as most scripts do, the logits in fp32."""
    return F.cross_entropy(F.linear(hidden, weight).float(), targets)


def torch_own(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute it by torch's function, in chunks; it knows no autocast."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden, weight = (x.to(torch.get_autocast_dtype(kind)) for x in (hidden, weight))
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, options=options)


def liger(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Compute it by Liger's kernel."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if torch.is_autocast_enabled("cuda"):
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets)


HEADS: dict[str, Head] = {PLAIN: plain, OURS: ours, "torch in chunks": torch_own, "Liger": liger}


def available() -> list[str]:
    """Return what can be measured here."""
    missing = set() if hasattr(torch.nn, "LinearCrossEntropyOptions") else {"torch in chunks"}
    if not importlib.util.find_spec("liger_kernel") or device().type == "cpu":
        missing.add("Liger")
    return [FLOOR, *(name for name in HEADS if name not in missing)]


def measure_head(name: str, dtype: str, rows: int) -> dict[str, float]:
    """Return the median seconds of a call, and by how many MB it grows the process at most."""
    where = device()
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(0)
    if name == FLOOR:
        call = build_products(DTYPES[dtype], rows, where)
    else:
        call = build_call(HEADS[name], DTYPES[dtype], rows, where)
    ready()
    return measure_calls(call, where, CALLS)


def build_call(
    head: Head, dtype: torch.dtype, rows: int, where: torch.device
) -> Callable[[], None]:
    """Return a call of forward and backward, which drops the gradients and waits for the device."""
    hidden = torch.randn(rows, WIDTH, device=where, requires_grad=True)
    weight = (0.02 * torch.randn(PADDED, WIDTH, device=where)).requires_grad_()
    targets = torch.randint(VOCABULARY, (rows,), device=where)

    def call() -> None:
        with torch.autocast(where.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = head(hidden, weight, targets)
        loss.backward()
        hidden.grad = weight.grad = None
        loss.item()

    return call


def build_products(dtype: torch.dtype, rows: int, where: torch.device) -> Callable[[], None]:
    """Return a call of the three products alone, into memory that is there: nothing is faster."""
    hidden = torch.randn(rows, WIDTH, device=where, dtype=dtype)
    weight = torch.randn(PADDED, WIDTH, device=where, dtype=dtype)
    logits = torch.randn(rows, PADDED, device=where, dtype=dtype)
    hidden_grad, weight_grad = torch.zeros_like(hidden), torch.zeros_like(weight)

    def call() -> None:
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=hidden_grad)
        torch.mm(logits.T, hidden, out=weight_grad)
        weight_grad[0, 0].item()

    return call


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yield all rows."""
    dtypes = [options.dtype] if options.dtype else [*DTYPES]
    keys = [(dtype, name) for dtype in dtypes for name in available()]

    def run(dtype: str, name: str) -> dict[str, float]:
        return run_child(measure_head, name, dtype, options.rows)[0]

    measures = {" ".join(key): lambda key=key: run(*key) for key in keys}
    results = in_turn(measures, options.repeat)
    for dtype, name in keys:
        own, base = ([r["seconds"] for r in results[f"{dtype} {n}"]] for n in (name, PLAIN))
        yield Row(f"{dtype} seconds", name, "s", own, base, "ratio <= 1" if name == OURS else "")
    for dtype, name in keys:
        own, base = ([r["peak_mb"] for r in results[f"{dtype} {n}"]] for n in (name, PLAIN))
        goal = "ratio <= 1" if name == OURS else ""
        if name != FLOOR:
            yield Row(f"{dtype} memory", name, "MB", own, base, goal)


HEADERS = {
    f"{dtype} {section}": text
    for dtype in DTYPES
    for section, text in {
        "seconds": f"Forward and backward in {dtype}: seconds, and times the plain head",
        "memory": f"Memory that it adds in {dtype}: MB at most, and times the plain head",
    }.items()
}


def main() -> None:
    """Measure the head and write the results."""
    parser = build_parser(main.__doc__, f"loss_{device().type}", repeat=3)
    parser.add_argument("--rows", type=int, default=2048, help="target tokens (N)")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: both)")
    options = parser.parse_args()
    write_report(measure(options), options, headers=HEADERS)


if __name__ == "__main__":
    begin(main)
