"""Export a checkpoint as a plain Hugging Face model folder that other tools load.

`export` writes the folder and its model card (`card`), `check` reloads it with transformers in a
fresh process (`reload`) and compares it with the model, `hub` uploads it.
"""
