"""Token ids on disk.

`shards` is the format of a prepared folder, `arrays` reads its splits as one array of tokens,
`foreign` reads the files of other projects, `handle` is an open file that threads can share.
"""
