"""The settings of a run, and how they are parsed.

Begin with `settings`, whose `Recipe` combines the sections; `training_sections` and `run_sections`
define them, one dataclass per concern. `rules` checks constraints between settings, `units` parses
quantities such as 10e9 tokens or 2h. `arguments` parses flags (based on `flags`), `overlays` reads
YAML files, `derived_defaults` adapts what was not given to what was, `renamed` lists the previous
names of settings, `unread` refuses flags without an effect.
"""
