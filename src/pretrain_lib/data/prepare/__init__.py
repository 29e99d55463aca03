"""Tokenize text into shards: restartable, with output that does not depend on the workers.

Begin with `job`, which describes the work, and `prepare`, which runs it unit by unit. `groups`
batches the documents of a unit, `holdout` selects those for validation, `loss_spans` the tokens
that count, `left_out` counts what is not written. `target` checks the folder, `manifest` records
the result. `spool` does the same continuously for streaming, `stream_errors` tells readers why it
failed.
"""
