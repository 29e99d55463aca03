"""Documents and tokenizers.

Begin with `sources` (what text there is) and `tokenizer` (its ids).

Sources: `opening` opens one by its name, `folders` finds the files of a folder, `remote` those
behind a URL; `dataset_rows` reads a dataset, `unchanged` tells whether files are still the same.

Documents: `formats` reads files, with `compression`, `json_lines`, `parquet_rows` (and `footers`)
and `separators`; `other_formats` refuses files that are not what their names say. `documents` has
the types that readers yield.

Tokenizers: `tokenizer` loads or trains one, from `tokenizer_files`; `tokenizer_parts` says what its
parts do, `lost_text` and `round_trip` whether its ids keep the text, `same_ids` whether two give
the same ids, `byte_counts` how many bytes ids stand for. `encoder` tokenizes documents with the
fastest library that gives the same ids, which `equivalence` tells; `cuts` divides long ones,
`plain_text` reads special tokens as text.
"""
