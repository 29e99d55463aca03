"""Write documents as shards."""

import numpy as np

from pretrain_lib.data.tokens.shards import write_shard


def write_documents(folder, name, documents, *, dtype="<u2", last_ends=True):
    """Write a shard of documents, lists of ids; `last_ends` is whether the last one ends here."""
    tokens = np.concatenate([np.empty(0, np.int64), *documents])
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    assert not len(tokens) or 0 <= tokens.min() <= tokens.max() <= np.iinfo(dtype).max
    ends = ends if last_ends else ends[:-1]
    return write_shard(folder, name, tokens.astype(dtype), ends, text_bytes=0)
