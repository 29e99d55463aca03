"""The models, GPT-2 and LLaMA, and the modules that they share.

Start with `gpt2` or `llama`, each a complete model in one file, then `attention` (and
`document_attention` for document masking), `rope` (rotary position embeddings), `blocks`
(activation checkpointing) and `loss` (fused output projection and cross-entropy). `cache` and
`generation` generate text, `hf` and `hf_config` load and save Hugging Face model folders, `adapter`
wraps any causal language model of transformers, `flops` counts floating-point operations.
"""
