"""What a run costs, before it runs (`--plan`).

`plan` puts the report together from `memory` (bytes per device) and `network` (bytes per step).
"""
