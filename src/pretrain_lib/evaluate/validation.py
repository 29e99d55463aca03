"""Validation: the loss on a fixed stretch of held-out tokens. Floor 4."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from pretrain_lib.data.arrays import TokenArray
from pretrain_lib.data.batches import to_device
from pretrain_lib.data.packing import Windows, fill_window, validation_windows
from pretrain_lib.data.tokenizer import Tokenizer
from pretrain_lib.metrics import perplexity


@dataclass(frozen=True)
class ValidationResult:
    """What a validation found."""

    loss: float
    """Nats per target token."""
    perplexity: float
    bits_per_byte: float | None
    """Comparable between tokenizers; None where the size of the text is not known."""
    targets: int

    def format(self) -> str:
        """Return the figures in one line."""
        bits = "" if self.bits_per_byte is None else f"  bits/byte {self.bits_per_byte:.4f}"
        loss = f"loss {self.loss:.4f}  ppl {self.perplexity:.5g}{bits}"
        return f"{loss}  ({self.targets:,} targets)"


@torch.no_grad()
def validate(
    accelerator: Accelerator,
    model: nn.Module,
    tokens: TokenArray,
    *,
    sequence_length: int,
    micro_batch: int,
    max_tokens: int,
    document_masking: bool = False,
    text_bytes: int | None = None,
) -> ValidationResult:
    """Return the loss over the first windows of `tokens`, every target token weighing the same.

    The windows are the same for any number of ranks, which share them out. `text_bytes` is what
    `evaluated_bytes` returns for them.
    """
    windows = validation_windows(tokens, sequence_length, max_tokens=max_tokens)
    training = model.training
    model.eval()
    totals = torch.zeros(2, device=accelerator.device)  # summed loss, targets
    stride = accelerator.num_processes * micro_batch
    for first in range(accelerator.process_index * micro_batch, windows, stride):
        rows = range(first, min(first + micro_batch, windows))
        batch = Windows.empty(len(rows), sequence_length, document_masking=document_masking)
        for row, window in enumerate(rows):
            fill_window(batch, row, tokens, window * sequence_length)
        tensors = {name: torch.from_numpy(array) for name, array in batch.as_dict().items()}
        with accelerator.autocast():
            loss, count = model(**to_device(tensors, accelerator.device))
        totals += torch.stack([loss, count.float()])
    model.train(training)
    loss_sum, targets = accelerator.reduce(totals, "sum").tolist()
    loss = loss_sum / targets
    bits = None if text_bytes is None else loss_sum / math.log(2) / text_bytes
    return ValidationResult(loss, perplexity(loss), bits, int(targets))


def evaluated_bytes(
    tokens: TokenArray | None,
    tokenizer: Tokenizer | None,
    *,
    sequence_length: int,
    max_tokens: int,
) -> int | None:
    """Return the size in bytes of the text that `validate` predicts, as UTF-8, if it is known."""
    if tokens is None or tokenizer is None:
        return None
    windows = validation_windows(tokens, sequence_length, max_tokens=max_tokens)
    return tokenizer.count_bytes(tokens.read(1, windows * sequence_length))
