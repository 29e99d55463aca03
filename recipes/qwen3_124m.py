"""A Qwen3 of GPT-2's size and vocabulary on 5 billion tokens of FineWeb-Edu, by Muon.

    accelerate launch --config_file accelerate_configs/ddp_8gpu.yaml recipes/qwen3_124m.py \
        --data.path PREPARED_FOLDER

Not trained yet: where the rates come from is in docs/learning.md. All settings: --print_config.
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
    # 123,552,768 parameters: 12 layers of 7,079,552 and 50,257 x 768 tied embeddings.
    model=LlamaConfig(
        vocabulary_size=50257,
        context_length=1024,
        num_layers=12,
        num_heads=12,
        num_key_value_heads=12,
        width=768,
        mlp_width=2048,  # 8/3 x 768: as many weights as GPT-2's two matrices of 4 x 768
        qk_norm=True,
        tied_head=True,
        rope_theta=10_000.0,
        norm_epsilon=1e-6,
    ),
    data=DataConfig(
        source="HuggingFaceFW/fineweb-edu:sample-10BT",
        validation="first:100e6",  # that of gpt2_124m
        tokenizer="gpt2",
    ),
    batch=BatchConfig(
        tokens=2**19,  # 524,288 = 1 process x 32 micro-batches x 16 x 1024, or 8 x 4 x 16 x 1024
        micro_batch=16,
        sequence_length=1024,
    ),
    optimizer=OptimizerConfig(
        kind="muon",
        learning_rate=6e-4,  # norms
        matrix_learning_rate=3.6e-3,
        embedding_learning_rate=2.4e-3,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        max_grad_norm=1.0,
    ),
    schedule=ScheduleConfig(
        kind="wsd",
        tokens=5_000_000_000,  # 9,536 steps of 2^19
        warmup_fraction=0.02,
        decay_fraction=0.6,
        final_fraction=0.0,
    ),
    samples=SampleConfig(
        prompts=["Hello, I'm a language model,"], per_prompt=4, tokens=32, top_k=50, every=250
    ),
    run=RunConfig(dir="runs/qwen3_124m", seed=1337),
    checkpoint=CheckpointConfig(every=2500),
    validation=ValidationConfig(every=250, tokens=20 * 2**19),
    scores=ScoreConfig(tasks=["hellaswag"], every=250),
)


def main(config: Recipe) -> str:
    """Train a Qwen3: text, processes, model, loop."""
    corpus = open_corpus(config)
    accelerator = start_accelerator(config)
    with torch.device("meta"):  # no memory yet: `train` allocates and draws the weights
        model = Llama(config.model)
    return train(config, model, corpus, accelerator)


if __name__ == "__main__":
    run_recipe(main, RECIPE)
