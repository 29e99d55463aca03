"""Validation loss on the fixed first windows of the held-out sets."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn

from pretrain_lib.corpus.stretches import Stretch
from pretrain_lib.data.windows.batches import to_device
from pretrain_lib.data.windows.document_ends import narrow_document_ends
from pretrain_lib.data.windows.packing import Windows, fill_window
from pretrain_lib.models.modes import evaluation_mode
from pretrain_lib.run_folder.metrics import perplexity
from pretrain_lib.wording import plural


@dataclass(frozen=True)
class ValidationResult:
    """The losses of one validation."""

    loss: float
    """Nats per target token."""
    perplexity: float
    bits_per_byte: float | None
    """Comparable between tokenizers; None if the size of the text is unknown."""
    targets: int
    by_text: dict[str, "ValidationResult"] = field(default_factory=dict)
    """The results of each held-out set, by name, if there are several."""

    def to_row(self) -> dict[str, float | None]:
        """Return the metrics by name; those of each of several held-out sets as `METRIC/NAME`."""
        names = ("loss", "perplexity", "bits_per_byte", "targets")
        row = {name: getattr(self, name) for name in names}
        for text, result in self.by_text.items():
            row |= {f"{name}/{text}": value for name, value in result.to_row().items()}
        return row

    def format(self) -> str:
        """Format the metrics in one line."""
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.4f} bits per byte"
        parts = "; ".join(f"{name} {part.loss:.4f}" for name, part in self.by_text.items())
        parts = f" ({parts})" if parts else ""
        loss = f"loss {self.loss:.4f}{parts}, perplexity {self.perplexity:,.5g}{bits}"
        return f"{loss}, over {plural(self.targets, 'token')}"


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: nn.Module,
    stretches: Sequence[Stretch],
    *,
    micro_batch: int,
    document_masking: bool = False,
) -> ValidationResult:
    """Return the mean loss over all target tokens of `stretches`.

    The windows are distributed over the ranks and do not depend on the world size.
    """
    # An fp32 sum over a hundred million targets loses precision, but MPS has no fp64.
    dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64
    totals = torch.zeros(len(stretches), 2, dtype=dtype, device=accelerator.device)
    with evaluation_mode(model):
        for place, stretch in enumerate(stretches):
            for batch in _own_batches(accelerator, stretch, micro_batch, document_masking):
                with accelerator.autocast():
                    loss, count = model(**to_device(batch, accelerator.device))
                totals[place] += torch.stack([loss.to(dtype), count.to(dtype)])  # nats, targets
    sums = accelerator.reduce(totals, "sum").tolist()
    results = {
        stretch.name: _result(*own, stretch.text_bytes)
        for stretch, own in zip(stretches, sums, strict=True)
    }
    if len(stretches) == 1:
        return results[stretches[0].name]
    sizes = [stretch.text_bytes for stretch in stretches]
    size = None if None in sizes else sum(sizes)
    return _result(*(sum(column) for column in zip(*sums, strict=True)), size, by_text=results)


def _own_batches(
    accelerator: Accelerator, stretch: Stretch, micro_batch: int, document_masking: bool
) -> Iterator[dict[str, torch.Tensor]]:
    length = stretch.sequence_length
    stride = accelerator.num_processes * micro_batch
    for first in range(accelerator.process_index * micro_batch, stretch.windows, stride):
        rows = range(first, min(first + micro_batch, stretch.windows))
        batch = Windows.empty(len(rows), length, document_masking=document_masking)
        for row, window in enumerate(rows):
            fill_window(batch, row, stretch.tokens, window * length)
        tensors = {name: torch.from_numpy(array) for name, array in batch.as_dict().items()}
        yield narrow_document_ends(tensors)


def _result(
    loss_sum: float,
    targets: float,
    text_bytes: int | None,
    by_text: dict[str, ValidationResult] | None = None,
) -> ValidationResult:
    loss = loss_sum / targets
    bits = None if text_bytes is None else loss_sum / math.log(2) / text_bytes
    return ValidationResult(loss, perplexity(loss), bits, int(targets), by_text or {})
