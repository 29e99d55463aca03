"""The table of document ends of a batch, as narrow as its rows allow."""

import torch


def narrow_document_ends(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut `document_ends` `(B, T)` to the largest number of documents in a row.

    Kernels launch work for each column. The width is rounded up to a power of two, so that
    torch.compile meets only a few widths.
    """
    ends = batch.get("document_ends")
    if ends is None:
        return batch
    documents = 1 + int((ends < ends.shape[1]).sum(dim=1).max())
    width = min(ends.shape[1], 1 << (documents - 1).bit_length())
    return batch | {"document_ends": ends[:, :width].contiguous()}
