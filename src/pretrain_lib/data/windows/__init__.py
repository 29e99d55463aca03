"""Training windows from token ids.

Begin with `order`, which determines which window comes when; then `packing`, what a window
contains, and `batches`, which gives each rank its micro-batches (`world` says which rank this is).
`best_fit` packs whole documents, `shuffled` permutes documents in each epoch, `document_ends`
narrows the table for document masking, `sources` says why a source gives no window. `streaming`
gives windows while the text is still being tokenized.
"""
