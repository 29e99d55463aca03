"""Text into shards of tokens, restartable, with bytes that do not depend on the workers.

`job` is what was asked for, `groups` cuts its sources into units of work, `holdout` chooses the
validation documents, `prepare` runs the units, `manifest` records the result.
"""
