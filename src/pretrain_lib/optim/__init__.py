"""AdamW, learning-rate and batch-size schedules, and detection of loss spikes.

`groups` builds the optimizer, `adamw_bf16` keeps its moments in bf16, `schedule` gives the learning
rate and the batch size of each step, `spikes` the limits above which an update is skipped.
"""
