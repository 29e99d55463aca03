"""Any causal language model of transformers, by its config.json: a file, a folder or a hub name.

    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/causal_lm.py \
        --model.config Qwen/Qwen3-0.6B --data.path PREPARED_FOLDER

Overlays beside this file, for --config: pythia_160m.yaml, smollm2_135m.yaml, qwen3_0_6b.yaml.
All settings: --print_config.
"""

import torch

from pretrain_lib import (
    BatchConfig,
    CausalLMConfig,
    CheckpointConfig,
    DataConfig,
    OptimizerConfig,
    Recipe,
    RunConfig,
    SampleConfig,
    ScheduleConfig,
    ScoreConfig,
    ValidationConfig,
    build_model,
    open_corpus,
    run_recipe,
    start_accelerator,
    train,
)

RECIPE = Recipe(
    # OLMo 2 in the shape of GPT-2: 190,550,784 parameters, of which 77,266,944 are embedding and
    # head.
    model=CausalLMConfig(
        config={
            "model_type": "olmo2",
            "vocab_size": 50304,
            "max_position_embeddings": 1024,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "rope_theta": 500_000.0,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        }
    ),
    data=DataConfig(
        source="HuggingFaceFW/fineweb-edu:sample-10BT",
        validation="first:100e6",
        tokenizer="gpt2",
    ),
    batch=BatchConfig(
        tokens=2**19,  # 524,288 = 1 process x 32 micro-batches x 16 x 1024
        micro_batch=16,
        sequence_length=1024,
    ),
    optimizer=OptimizerConfig(
        learning_rate=6e-4, betas=(0.9, 0.95), epsilon=1e-8, weight_decay=0.1, max_grad_norm=1.0
    ),
    schedule=ScheduleConfig(
        kind="cosine", tokens=10_000_000_000, warmup_fraction=0.0375, final_fraction=0.1
    ),
    samples=SampleConfig(prompts=["The history of science is"], per_prompt=2, every=250),
    run=RunConfig(dir="runs/causal_lm", seed=1337),
    checkpoint=CheckpointConfig(every=5000),
    validation=ValidationConfig(every=250, tokens=20 * 2**19),
    scores=ScoreConfig(tasks=["hellaswag"], every=1000),
)


def main(config: Recipe) -> str:
    """Train a model of transformers: text, processes, model, loop."""
    corpus = open_corpus(config)
    accelerator = start_accelerator(config)
    with torch.device("meta"):  # no memory yet: `train` allocates and draws the weights
        model = build_model(config.model)
    return train(config, model, corpus, accelerator)


if __name__ == "__main__":
    run_recipe(main, RECIPE)
