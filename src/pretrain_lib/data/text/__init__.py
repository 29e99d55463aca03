"""Documents and tokenizers.

`sources` finds files and datasets, `formats` and `rows` read documents from them, `tokenizer`
loads or trains a tokenizer, `encoder` turns documents into ids with the fastest exact library.
"""
