"""Token ids on disk.

`shards` is the format of a prepared folder, `arrays` reads a split as one array of tokens, `ends`
has the ends of documents. `foreign` opens the token files of other projects, of which `headerless`,
`megatron` and `litdata` know one format each. `handle` is a file handle shared by threads.
"""
