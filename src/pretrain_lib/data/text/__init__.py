"""Documents and tokenizers.

`sources` finds files (behind a URL by `remote`) and datasets, `formats` and `rows` read documents
from them, `tokenizer` loads or trains a tokenizer, and `encoder` tokenizes documents with the
fastest library that gives the same ids, which `equivalence` tells.
"""
