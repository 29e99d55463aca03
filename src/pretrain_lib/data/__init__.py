"""From documents to batches of packed windows.

Read in the order in which the data flows: `text` (sources, formats, tokenizers), `tokens` (shards
on disk and how they are read), `prepare` (text into shards), `windows` (order, packing, batches).
`permutation` is the shuffle that `prepare` and `windows` share; `pool` runs workers; `inspection`
and `overlap` serve the commands of those names.
"""
