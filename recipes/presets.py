"""The size tables of GPT-2 and GPT-3, for `--preset NAME` of the GPT-2 recipe."""

# name: layers, heads, width, peak learning rate, tokens per step, context
# GPT-2 (Radford et al. 2019, table 2); rates and batches are GPT-3's of the nearest size.
# GPT-3 (Brown et al. 2020, table 2.1); its batches in tokens are rounded to powers of two. 13B has
# 40 heads of 128 = 5,120 wide here; the paper's 5,140 is not a multiple of its heads.
SIZES = {
    "gpt2": (12, 12, 768, 6.0e-4, 2**19, 1024),
    "gpt2-medium": (24, 16, 1024, 3.0e-4, 2**19, 1024),
    "gpt2-large": (36, 20, 1280, 2.5e-4, 2**19, 1024),
    "gpt2-xl": (48, 25, 1600, 2.0e-4, 2**20, 1024),
    "gpt3-small": (12, 12, 768, 6.0e-4, 2**19, 2048),
    "gpt3-medium": (24, 16, 1024, 3.0e-4, 2**19, 2048),
    "gpt3-large": (24, 16, 1536, 2.5e-4, 2**19, 2048),
    "gpt3-xl": (24, 16, 2048, 2.0e-4, 2**20, 2048),
    "gpt3-2.7b": (32, 32, 2560, 1.6e-4, 2**20, 2048),
    "gpt3-6.7b": (32, 32, 4096, 1.2e-4, 2**21, 2048),
    "gpt3-13b": (40, 40, 5120, 1.0e-4, 2**21, 2048),
    "gpt3-175b": (96, 96, 12288, 0.6e-4, 2**22, 2048),
}

GPT2_PRESETS = {
    name: {
        "model.num_layers": layers,
        "model.num_heads": heads,
        "model.width": width,
        "model.context_length": context,
        "batch.sequence_length": context,
        "batch.tokens": tokens,
        "optimizer.learning_rate": rate,
        "run.dir": f"runs/{name}",
    }
    for name, (layers, heads, width, rate, tokens, context) in SIZES.items()
}
