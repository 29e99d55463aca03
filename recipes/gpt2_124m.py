"""GPT-2 124M on 10 billion tokens of FineWeb-Edu: the loss curve of the original, and better.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/gpt2_124m.py

Overlays beside this file, for --config: quickstart.yaml, gpt2_124m_fast.yaml, gpt2_5_epochs.yaml,
gpt2_t2048.yaml, shakespeare_char.yaml. Sizes: --preset gpt2-medium, gpt3-xl, ... (presets.py). All
settings: --print_config.
"""

import torch
from presets import GPT2_PRESETS

from pretrain_lib import (
    GPT2,
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    GPT2Config,
    OptimizerConfig,
    Recipe,
    RunConfig,
    SampleConfig,
    ScheduleConfig,
    ScoreConfig,
    ValidationConfig,
    open_corpus,
    run_recipe,
    start_accelerator,
    train,
)

RECIPE = Recipe(
    # 124,439,808 parameters; the table is padded to 50,304 = 393 x 128 rows.
    model=GPT2Config(
        vocabulary_size=50257, context_length=1024, num_layers=12, num_heads=12, width=768
    ),
    data=DataConfig(
        source="HuggingFaceFW/fineweb-edu:sample-10BT",
        validation="first:100e6",  # the first shard of the text behind the published figure
        tokenizer="gpt2",
    ),
    batch=BatchConfig(
        tokens=2**19,  # 524,288 = 1 process x 32 micro-batches x 16 x 1024, or 8 x 4 x 16 x 1024
        micro_batch=16,
        sequence_length=1024,
    ),
    optimizer=OptimizerConfig(
        learning_rate=6e-4, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, max_grad_norm=1.0
    ),
    schedule=ScheduleConfig(
        kind="cosine",
        tokens=10_000_000_000,  # 19,073 steps of 2^19
        warmup_fraction=0.0375,  # 375M tokens, 715 steps
        final_fraction=0.1,
    ),
    samples=SampleConfig(
        prompts=["Hello, I'm a language model,"], per_prompt=4, tokens=32, top_k=50, every=250
    ),
    run=RunConfig(dir="runs/gpt2_124m", seed=1337),
    checkpoint=CheckpointConfig(every=5000),
    validation=ValidationConfig(every=250, tokens=20 * 2**19),  # 20 batches
    scores=ScoreConfig(tasks=["hellaswag"], every=250),  # all of its 10,042 items
)


def main(config: Recipe) -> str:
    """Train GPT-2: text, processes, model, loop."""
    corpus = open_corpus(config)
    accelerator = start_accelerator(config)
    with torch.device("meta"):  # no memory yet: `train` allocates and draws the weights
        model = GPT2(config.model)
    return train(config, model, corpus, accelerator)


if __name__ == "__main__":
    run_recipe(main, RECIPE, presets=GPT2_PRESETS)
