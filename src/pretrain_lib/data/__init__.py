"""The data pipeline: from documents to batches of packed windows.

In the order in which the data flows: `text` (sources, file formats, tokenizers), `tokens` (the
on-disk format of token ids and its readers), `prepare` (tokenize text into shards), `windows`
(order, packing, batches). `permutation` is the shuffle that `prepare` and `windows` share, `pool`
runs worker processes, and `inspection` and `overlap` implement `pretrain inspect` and
`pretrain overlap`.
"""
