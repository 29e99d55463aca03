"""The data of a run, opened and checked against its model.

`corpus` opens whatever `config.data` names, `paths` one path of it, `autoprepare` prepares a
source when a run starts, `stretches` chooses the validation text, `origin` names the text's source.
"""
