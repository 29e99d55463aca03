"""A checkpoint as a plain Hugging Face folder that other tools load.

`export` writes it with its model card (`card`), `check` compares it with the model through
transformers in a fresh process (`reload`), `hub` uploads it.
"""
