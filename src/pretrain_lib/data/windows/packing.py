"""Sequence packing: fill windows with inputs, targets and document ends from a token array.

Documents are concatenated without padding ("concat"), or a plan packs whole documents into windows
("best_fit", `data.windows.best_fit`). By default attention crosses document boundaries within a
window, as in GPT-2; with document masking each document attends only to itself.
"""

from dataclasses import dataclass

import numpy as np

from pretrain_lib.data.tokens.arrays import TokenArray
from pretrain_lib.data.windows.best_fit import BestFitPlan
from pretrain_lib.data.windows.shuffled import ShuffledDocuments

IGNORED_TARGET = -100  # the target of a position that is left out of the loss, as in transformers


@dataclass
class Windows:
    """Arrays for B windows of T tokens, filled one by one."""

    input_ids: np.ndarray
    """int64 (B, T)."""
    targets: np.ndarray
    """int64 (B, T): the token that follows each input, or `IGNORED_TARGET`."""
    document_ends: np.ndarray | None
    """int32 (B, T), with document masking: the index after the last token of each document in the
    window, ascending, padded with T."""

    @classmethod
    def empty(cls, count: int, sequence_length: int, *, document_masking: bool) -> "Windows":
        """Allocate `count` windows."""
        shape = (count, sequence_length)
        ends = np.full(shape, sequence_length, dtype=np.int32) if document_masking else None
        return cls(np.empty(shape, dtype=np.int64), np.empty(shape, dtype=np.int64), ends)

    def as_dict(self) -> dict[str, np.ndarray]:
        """Return the arrays by the names of the models' arguments."""
        arrays = {"input_ids": self.input_ids, "targets": self.targets}
        if self.document_ends is not None:
            arrays["document_ends"] = self.document_ends
        return arrays


def fill_window(
    windows: Windows, row: int, tokens: TokenArray | ShuffledDocuments, start: int
) -> None:
    """Fill a row with the tokens from `start` on.

    Targets that a loss mask leaves out, or with document masking the next document's, are ignored.
    """
    length = windows.input_ids.shape[1]
    ids = np.empty(length + 1, dtype=np.int64)
    tokens.read_into(start, ids)
    windows.input_ids[row], windows.targets[row] = ids[:-1], ids[1:]
    tokens.ignore_masked(windows.targets[row], start + 1, IGNORED_TARGET)
    if windows.document_ends is not None:
        ends = tokens.document_ends(start, length + 1)  # may include the end of the window
        windows.targets[row, ends - 1] = IGNORED_TARGET
        windows.document_ends[row, : len(ends)] = ends


def fill_planned_window(
    windows: Windows, row: int, tokens: TokenArray, plan: BestFitPlan, window: int
) -> None:
    """Fill a row with the whole documents, or pieces of long ones, that a plan assigns to it.

    The target of a document's last token is the next token of the array: an end-of-text token, or,
    in arrays whose documents end with one, the first of the document that follows there. With
    document masking it is ignored. Padding is token 0 with an ignored target.
    """
    input_ids, targets = windows.input_ids[row], windows.targets[row]
    length, position, ends = len(input_ids), 0, []
    masking = windows.document_ends is not None
    ids = np.empty(length + 1, dtype=np.int64)
    for start, count in plan.pieces(window).tolist():
        # A piece shorter than a window is the last of its document, and need not be looked up.
        masked = masking and (count < length or _ends_at(tokens, start + count))
        read = count if masked or start + count == len(tokens) else count + 1
        tokens.read_into(start, ids[:read])
        ids[read : count + 1] = IGNORED_TARGET
        end = position + count
        input_ids[position:end], targets[position:end] = ids[:count], ids[1 : count + 1]
        tokens.ignore_masked(targets[position : position + read - 1], start + 1, IGNORED_TARGET)
        position = end
        ends.append(end)
    input_ids[position:], targets[position:] = 0, IGNORED_TARGET
    if masking:
        windows.document_ends[row, : len(ends)] = ends


def _ends_at(tokens: TokenArray, position: int) -> bool:
    return position == len(tokens) or len(tokens.document_ends(position - 1, 2)) > 0


def validation_windows(tokens: TokenArray, sequence_length: int, *, max_tokens: int | None) -> int:
    """Return the number of whole windows in the first `max_tokens` (None: all) of `tokens`."""
    windows = (len(tokens) - 1) // sequence_length
    if windows < 1:
        raise ValueError(
            f"validation needs one window of batch.sequence_length + 1 = {sequence_length + 1} "
            f"tokens: the set has {len(tokens)}; hold out more (data.validation) or lower "
            f"batch.sequence_length"
        )
    return windows if max_tokens is None else min(windows, max_tokens // sequence_length)
