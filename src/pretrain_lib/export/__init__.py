"""Export a checkpoint as a plain Hugging Face model folder that other tools load.

Begin with `export`, which writes the folder and its model card (`card`, with scores that
`scores_file` reads). `check` reloads it with transformers in a fresh process (`reload`) and
compares it with the model, `hub` uploads it.
"""
