"""Estimate memory, communication and time of a run before it starts (`--plan`).

Begin with `plan`, which makes the report; `text` has its lines. `step` describes a training step,
`memory` estimates the peak memory per device from what each of the `layers` takes (and `muon`;
`transformers_memory` for models of transformers), `network` the bytes sent per step, `micro_batch`
the largest one that fits, `disk` the checkpoints that there are at once.
"""
