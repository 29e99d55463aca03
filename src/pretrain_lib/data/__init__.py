"""The data pipeline: from documents to batches of packed windows.

Begin with the packages, in the order in which the data flows: `text` (sources, file formats,
tokenizers), `prepare` (tokenize text into shards), `tokens` (the on-disk format of token ids and
its readers), `windows` (order, packing, batches). `permutation` is the shuffle that `prepare` and
`windows` share, `pool` runs worker processes, `remote` reads storages behind URLs, of which
`block_cache` keeps blocks on the local disk. `inspection` is `pretrain inspect`, `overlap` is
`pretrain overlap`, whose items `overlap_items` reads.
"""
