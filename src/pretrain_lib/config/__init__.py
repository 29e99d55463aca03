"""The settings of a run and how they are read.

`training_sections` and `run_sections` have one dataclass per concern, `settings` all of them in a
`Recipe`, `rules` checks what concerns several together, `units` reads quantities such as `10e9`
tokens or `2h`; `arguments` reads flags and `overlays` YAML files, `renamed` has the names that
settings had before.
"""
