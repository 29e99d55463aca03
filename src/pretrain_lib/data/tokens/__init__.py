"""Token ids on disk.

Begin with `shards`, the format of a prepared folder, and `arrays`, which reads a split as one
array. `manifests` has the manifest of a folder, `ends` the ends of documents, `checked` verifies
blocks as they are read, `verify` whole folders. `places` are local paths and URLs, `handle` is a
file handle shared by threads. `foreign` opens the token files of other projects, of which
`headerless`, `megatron`, `litdata` and `datatrove` know one format each; `contents` and
`unprepared` tell what a path holds that is none of these.
"""
