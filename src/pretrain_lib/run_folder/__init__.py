"""The files that a run writes besides its checkpoints.

`layout` knows a run folder by its files, `folder` creates and locks it and writes settings,
manifest and status; `metrics` writes the rows of `metrics.jsonl` and the console output, `rows`
reads the rows back, `cut` drops those behind the checkpoint that a run resumes from.
"""
