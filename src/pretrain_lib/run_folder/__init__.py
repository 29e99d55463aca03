"""The files that a run writes besides its checkpoints.

Begin with `layout`, which knows a run folder by its files, and `folder`, which creates and locks it
and writes settings and manifest. `status` is the state of the run; `metrics` writes the rows of
metrics.jsonl and the console output, `rows` reads the rows back, `cut` drops those behind the
checkpoint that a run resumes from. `markdown` quotes text of others.
"""
