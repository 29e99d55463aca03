"""Tokenize text into shards: restartable, with output that does not depend on the workers.

`job` describes the work, `holdout` selects the validation documents, `groups` batches the documents
of a unit of work, `prepare` runs the units, `manifest` records the result, and `spool` does the
same continuously for streaming.
"""
