"""Text that the model writes. Floor 3."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from pretrain_lib.config import SampleConfig
from pretrain_lib.data.tokenizer import Tokenizer
from pretrain_lib.models.hf import Model


@torch.no_grad()
def generate(
    model: nn.Module,
    prompt: Sequence[int],
    *,
    new_tokens: int,
    context_length: int,
    end_of_text_id: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Return the ids that follow `prompt`, at most `new_tokens`, ended by `end_of_text_id`.

    Temperature 0 takes the likeliest. `top_k` keeps so many of the likeliest, `top_p` the smallest
    set whose probability reaches it (Holtzman et al. 2020). `generator` lives on the CPU.
    """
    if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and top_p <= 0):
        raise ValueError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}: none may be negative, and "
            f"of top_k and top_p none may be 0"
        )
    device = next(model.parameters()).device
    ids = list(prompt)
    for _ in range(new_tokens):
        window = torch.tensor([ids[-context_length:]], device=device)
        logits = model(window)[0, -1].float().cpu()  # (V,)
        token = _choose(logits, temperature, top_k, top_p, generator)
        if token == end_of_text_id:
            break
        ids.append(token)
    return ids[len(prompt) :]


def _choose(
    logits: torch.Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> int:
    if temperature == 0:
        return int(logits.argmax())
    probabilities, ids = (logits / temperature).softmax(dim=0).sort(descending=True)
    if top_k is not None:
        probabilities, ids = probabilities[:top_k], ids[:top_k]
    if top_p is not None:
        before = probabilities.cumsum(dim=0) - probabilities
        probabilities = probabilities[before < top_p]
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def sample_texts(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    per_prompt: int,
    new_tokens: int,
    context_length: int,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> list[dict[str, str]]:
    """Return `{"prompt", "text"}` for every sample; neither training mode nor its RNG changes."""
    training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for prompt in prompts:
        start = [tokenizer.end_of_text_id, *tokenizer.encode(prompt)]
        for _ in range(per_prompt):
            ids = generate(
                model,
                start,
                new_tokens=new_tokens,
                context_length=context_length,
                end_of_text_id=tokenizer.end_of_text_id,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                generator=generator,
            )
            samples.append({"prompt": prompt, "text": tokenizer.decode(ids)})
    model.train(training)
    return samples


def write_samples(
    path: Path,
    model: Model,
    tokenizer: Tokenizer,
    settings: SampleConfig,
    *,
    step: int,
    seed: int,
) -> list[str]:
    """Sample as `settings` say, append the rows to `path`, and return the texts, prompts first."""
    samples = sample_texts(
        model,
        tokenizer,
        settings.prompts,
        per_prompt=settings.per_prompt,
        new_tokens=settings.tokens,
        context_length=model.config.context_length,
        seed=seed,
        temperature=settings.temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
    )
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({"step": step, **sample}) + "\n" for sample in samples)
    return [sample["prompt"] + sample["text"] for sample in samples]
