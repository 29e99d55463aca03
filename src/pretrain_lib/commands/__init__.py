"""The `pretrain` command.

Begin with `cli`, which parses the flags. `recipes` runs new, train and completion, `data` prepare,
verify, inspect and overlap, `model` tasks, export, eval and sample, `report` plot and report,
`tune` the search for learning rates. `launching` starts recipes in several processes, `budget` is
`train --budget`, `flag_names` translates settings in messages into flags.
"""
