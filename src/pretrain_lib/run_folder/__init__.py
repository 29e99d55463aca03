"""The files that a run writes besides its checkpoints.

`folder` creates and locks the run folder and writes settings, manifest and status; `metrics` writes
the rows of `metrics.jsonl` and the console output, `rows` reads the rows back.
"""
