"""AdamW and Muon, learning-rate and batch-size schedules, and detection of loss spikes.

Begin with `groups`, which builds the optimizer from the groups of `parameters` and refuses what
`arguments` says. `muon` updates matrices by `newton_schulz`, which `matrix_sharing` divides among
processes; `adamw_bf16` keeps moments in bf16. `schedule` gives the learning rate and the batch size
of each step, `spikes` the limits above which an update is skipped, `state` the optimizer's state as
a checkpoint holds it.
"""
