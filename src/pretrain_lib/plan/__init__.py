"""Estimate memory, communication and time of a run before it starts (`--plan`).

`plan` prints the report, `memory` estimates the peak memory per device, `network` the bytes sent
per step.
"""
