"""The settings of a run and how they are read.

`settings` has one dataclass per concern, `rules` checks values and combinations, `units` reads
quantities such as `10e9` tokens or `2h`, `arguments` reads YAML files and command-line flags.
"""
