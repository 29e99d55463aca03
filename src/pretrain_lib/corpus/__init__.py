"""The data of a run, opened and checked against the model.

Begin with `corpus`, which opens everything that `config.data` names. `paths` opens a single path,
`autoprepare` prepares a source when a run starts, `fit` fills in the settings that depend on the
text, `stretches` selects the validation windows, `origin` tells which text a run was trained on.
"""
