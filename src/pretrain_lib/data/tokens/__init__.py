"""Token ids on disk.

`shards` is the format of a prepared folder, `arrays` reads a split as one array of tokens,
`foreign` reads the token files of other projects, `handle` is a file handle shared by threads.
"""
