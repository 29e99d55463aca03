"""Documents and tokenizers.

`sources` finds files and datasets, `formats` and `rows` read documents from them, `tokenizer`
loads or trains a tokenizer, and `encoder` tokenizes documents with the fastest library that gives
the same ids.
"""
