"""Training windows from token ids.

`order` determines which window comes when, `packing` and `best_fit` what a window contains, and
`batches` gives each rank its micro-batches. `streaming` does the same while the text is still being
tokenized.
"""
