"""LLaMA 1.3B on 45 billion tokens of FineWeb-Edu, with a byte-level BPE of 8,192 of its own.

    accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml recipes/llama_1_3b.py \
        --data.path PREPARED_FOLDER

Overlay beside this file, for --config: basic.yaml. All settings: --print_config.
"""

import torch

from pretrain_lib import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    Llama,
    LlamaConfig,
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
    # 1,266,780,160 parameters: 24 layers, 8,192 x 2,048 embeddings and as many for the head.
    model=LlamaConfig(
        vocabulary_size=8192,
        context_length=2048,
        num_layers=24,
        num_heads=32,
        num_key_value_heads=32,
        width=2048,
        mlp_width=5632,  # 2/3 x 4 x 2048 = 5461, rounded up to a multiple of 256
        rope_theta=10_000.0,
        norm_epsilon=1e-5,
    ),
    data=DataConfig(
        source="HuggingFaceFW/fineweb-edu:sample-100BT",  # 50B tokens are gathered, 45B are used
        validation="first:100e6",
        train_tokenizer=8192,
    ),
    batch=BatchConfig(
        tokens=2**19,  # 524,288 = 1 process x 64 micro-batches x 4 x 2048, or 8 x 8 x 4 x 2048
        micro_batch=4,
        sequence_length=2048,
    ),
    optimizer=OptimizerConfig(
        learning_rate=6e-4, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, max_grad_norm=1.0
    ),
    schedule=ScheduleConfig(
        kind="cosine",
        tokens=45_000_000_000,  # 85,830 steps of 2^19
        warmup_tokens=128 * 2**19,  # 67M tokens
        final_fraction=0.1,
    ),
    samples=SampleConfig(
        prompts=[
            "Question: What do plants need to grow? Answer: water, soil and light.\n"
            "Question: What do animals need to live? Answer:",
            "The history of science is",
        ],
        per_prompt=1,
        tokens=64,
        temperature=1.0,
        top_k=None,
        top_p=0.8,
        every=250,
        growth=1.1,
    ),
    run=RunConfig(dir="runs/llama_1_3b", seed=89),
    checkpoint=CheckpointConfig(every_tokens=1_000_000_000),
    validation=ValidationConfig(every=1000, tokens=20 * 2**19),  # 20 batches
    scores=ScoreConfig(tasks=["hellaswag", "arc_easy", "piqa"], every=2000),
)


def main(config: Recipe) -> str:
    """Train LLaMA: text, processes, model, loop."""
    corpus = open_corpus(config)
    accelerator = start_accelerator(config)
    with torch.device("meta"):  # no memory yet: `train` allocates and draws the weights
        model = Llama(config.model)
    return train(config, model, corpus, accelerator)


if __name__ == "__main__":
    run_recipe(main, RECIPE)
