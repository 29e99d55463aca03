"""The models: GPT-2, LLaMA and any causal language model of transformers, and what they share.

Begin with `gpt2` or `llama`, each a complete model in one file, then `attention` (and
`document_attention` for document masking), `rope` (rotary position embeddings), `blocks`
(activation checkpointing) and `loss` (fused output projection and cross-entropy). `token_ids`
checks inputs and targets, `places` finds where tokens stand in their documents. `cache` and
`generation` generate text, `modes` switches to evaluation and back, `flops` counts floating-point
operations.

`interface` says what the library asks of a model, and `any_model` has what depends on its kind.
`hf`, `hf_config` and `weight_files` load and save folders of GPT-2 and LLaMA. `adapter` wraps a
model of transformers: `transformers_config` describes it, `transformers_family` finds what its
family does, `transformers_head`, `transformers_cache`, `transformers_folder` and
`transformers_flops` are its output head, cache, folders and FLOPs, `transformers_fake` runs it
without numbers.
"""
