"""GPT-2 and LLaMA: one readable file each, and what both are made of.

Start with `gpt2` or `llama`, then `attention` (and `document_attention` for packed documents),
`blocks` (activation checkpointing), `loss` (the head fused with the cross-entropy). `cache` and
`generation` write text, `hf` and `hf_config` load and save Hugging Face folders, `adapter` wraps a
model of transformers, `flops` counts operations.
"""
