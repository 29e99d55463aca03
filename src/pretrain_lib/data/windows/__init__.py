"""Training examples out of token ids.

`order` decides which window comes when, `packing` and `best_fit` what is in a window, `batches`
hands a rank its micro-batches. `spool` and `streaming` do the same while the text is still being
tokenized.
"""
