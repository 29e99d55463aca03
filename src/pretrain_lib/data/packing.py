"""Windows of packed documents: from a place in the token stream to inputs, targets, documents.

Documents follow one another without padding ("concat"). By default a window is one stretch of text,
as GPT-2 was trained; with `document_masking` a document in it sees only itself. Floor 1.
"""

import numpy as np

from pretrain_lib.data.shards import TokenArray
from pretrain_lib.loss import IGNORED_TARGET


def read_window(
    tokens: TokenArray, start: int, sequence_length: int, *, document_masking: bool = False
) -> dict[str, np.ndarray]:
    """Return the window that begins at token `start`.

    `input_ids` and `targets`, int64 `(T,)`: targets are one token further. With `document_masking`
    also `document_ends`, int32 `(T,)`: the index after each document's last token within the
    window, rising, filled up with T; the target that lies in the next document is ignored.
    """
    ids = tokens.read(start, sequence_length + 1)
    window = {"input_ids": ids[:-1], "targets": ids[1:].copy()}
    if document_masking:
        ends = tokens.document_ends(start, sequence_length + 1)
        window["targets"][ends - 1] = IGNORED_TARGET
        window["document_ends"] = np.full(sequence_length, sequence_length, dtype=np.int32)
        inside = ends[ends < sequence_length]
        window["document_ends"][: len(inside)] = inside
    return window


def validation_windows(tokens: TokenArray, sequence_length: int, *, max_tokens: int) -> int:
    """Return how many whole windows a validation pass over at most `max_tokens` reads."""
    available = (len(tokens) - 1) // sequence_length
    windows = min(available, max_tokens // sequence_length)
    if windows < 1:
        raise ValueError(
            f"validation needs one window of batch.sequence_length + 1 = {sequence_length + 1} "
            f"tokens: the set has {len(tokens)}, run.evaluate_tokens={max_tokens}; hold out more "
            f"(data.validation) or shorten the sequence"
        )
    return windows
