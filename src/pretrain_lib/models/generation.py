"""Text generation."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.models.adapter import CausalLMAdapter
from pretrain_lib.models.any_model import check_tokenizer, new_cache
from pretrain_lib.models.cache import KeyValueCache
from pretrain_lib.models.interface import Model, unwrap
from pretrain_lib.models.modes import evaluation_mode
from pretrain_lib.models.transformers_cache import TransformersCache
from pretrain_lib.values import show


@torch.no_grad()
def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    context_length: int,
    end_of_text_id: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    row_numbers: Sequence[int] | None = None,
    is_done: Callable[[list[int]], bool] | None = None,
) -> list[list[int]]:
    """Generate up to `new_tokens` token ids after each prompt, stopping at `end_of_text_id`.

    The model generates as in evaluation mode, without dropout; its own mode is unchanged.
    Temperature 0 is greedy decoding. `top_k` samples from the k most likely tokens, `top_p` from
    the smallest set of tokens whose probability reaches p (Holtzman et al. 2020); with both, the
    probabilities are those among the k tokens. Row i uses a random generator seeded with (`seed`,
    i), or with (`seed`, `row_numbers[i]`), so its samples do not depend on the other prompts. A row
    also stops when `is_done`, called with its new ids, returns True.

    A key-value cache is used until the longest row exceeds `context_length`. From then on, each new
    token is computed without a cache, from the last `context_length` ids of its row.
    """
    model = unwrap(model)
    _check(prompts, temperature, top_k, top_p)
    _check_lengths(context_length, new_tokens)
    numbers = range(len(prompts)) if row_numbers is None else row_numbers
    choose = partial(_choose, temperature=temperature, top_k=top_k, top_p=top_p)
    choosers = [partial(choose, generator=_row_generator(seed, number)) for number in numbers]
    texts: list[list[int]] = [[] for _ in prompts]
    with evaluation_mode(model):
        for group in _groups(model, prompts):
            continued = _generate_together(
                model,
                [prompts[i] for i in group],
                [choosers[i] for i in group],
                new_tokens=new_tokens,
                context_length=context_length,
                end_of_text_id=end_of_text_id,
                is_done=is_done or (lambda _: False),
            )
            for i, text in zip(group, continued, strict=True):
                texts[i] = text
    return texts


def _groups(model: Model, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the indices of the prompts that are continued together.

    The caches of transformers differ in how they treat padding, so they get rows of equal length.
    """
    if not isinstance(model, CausalLMAdapter):
        return [list(range(len(prompts)))]
    lengths = sorted({len(prompt) for prompt in prompts})
    return [[i for i, prompt in enumerate(prompts) if len(prompt) == n] for n in lengths]


def _generate_together(
    model: Model,
    prompts: Sequence[Sequence[int]],
    choosers: Sequence[Callable[[torch.Tensor], int]],
    *,
    new_tokens: int,
    context_length: int,
    end_of_text_id: int | None,
    is_done: Callable[[list[int]], bool],
) -> list[list[int]]:
    rows = [[int(token) for token in prompt] for prompt in prompts]
    longest = max(map(len, rows), default=0) + new_tokens
    cache = new_cache(model, rows=len(rows), slots=min(longest, context_length))
    unfinished = list(range(len(rows)))
    for _ in range(new_tokens):
        if not unfinished:
            break
        logits = _next_logits(model, [rows[i] for i in unfinished], context_length, cache)
        going_on = []
        for place, i in enumerate(unfinished):
            token = choosers[i](logits[place])
            if token == end_of_text_id:
                continue
            rows[i].append(token)
            if not is_done(rows[i][len(prompts[i]) :]):
                going_on.append(place)
        if cache is not None and 0 < len(going_on) < len(unfinished):
            cache = cache.expand(torch.tensor(going_on), slots=cache.slots)
        unfinished = [unfinished[place] for place in going_on]
    return [row[len(prompt) :] for row, prompt in zip(rows, prompts, strict=True)]


def _check(
    prompts: Sequence[Sequence[int]], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    if any(np.ndim(ids) != 1 for ids in prompts):
        raise ValueError(
            f"prompts={show(prompts)} must be several lists of token ids, such as "
            f"[tokenizer.encode(text)]"
        )
    if not all(map(len, prompts)):
        raise ValueError(f"prompts={prompts}: each needs a token, such as the end of text")
    if (
        not 0 <= temperature < math.inf
        or (top_k is not None and top_k < 1)
        or (top_p is not None and top_p <= 0)
    ):
        raise ValueError(
            f"temperature={temperature}, top_k={top_k}, top_p={top_p}: none may be negative "
            f"or no number, and of top_k and top_p none may be 0"
        )


def _check_lengths(context_length: int, new_tokens: int) -> None:
    if context_length < 1 or new_tokens < 0:
        raise ValueError(
            f"context_length={context_length}, new_tokens={new_tokens}: at least one token of "
            f"context is needed, and no fewer than 0 new ones"
        )


def _row_generator(seed: int, row: int) -> torch.Generator:
    # A CPU generator uses only 32 bits of its seed, so seed and row are hashed into these.
    mixed = np.random.SeedSequence([seed % 2**64, row]).generate_state(1, np.uint32)
    return torch.Generator().manual_seed(int(mixed[0]))


def _next_logits(
    model: Model,
    rows: list[list[int]],
    context_length: int,
    cache: KeyValueCache | TransformersCache | None,
) -> torch.Tensor:
    """Return the logits of the token after each row, (B, V) in fp32 on the CPU."""
    if cache is not None and max(map(len, rows)) <= context_length:
        new = [row[seen:] for row, seen in zip(rows, cache.lengths.tolist(), strict=True)]
        options = {"cache": cache}
    else:
        new, options = [row[-context_length:] for row in rows], {}
    counts = torch.tensor([len(ids) for ids in new])
    # Padded on the right, where causal attention hides the padding from real tokens.
    padded = pad_sequence([torch.tensor(ids) for ids in new], batch_first=True)
    logits = model(padded.to(next(model.parameters()).device), **options)
    if options:
        cache.advance(counts)
    return logits[torch.arange(len(rows)), counts - 1].float().cpu()


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
        probabilities = probabilities[:top_k] / probabilities[:top_k].sum()
    if top_p is not None:
        before = probabilities.cumsum(dim=0) - probabilities
        probabilities = probabilities[before < top_p]
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])


def sample_texts(
    model: Model,
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
    rows: slice = slice(None),
) -> list[dict[str, str]]:
    """Return `{"prompt", "text"}` for each sample; global random numbers are unchanged.

    `rows` selects which samples to generate; their texts do not depend on the selection.
    """
    check_tokenizer(tokenizer)
    if isinstance(prompts, str):
        raise ValueError(f"prompts={show(prompts)} must be several texts, such as [text]")
    chosen = [prompt for prompt in prompts for _ in range(per_prompt)]
    numbers, chosen = range(len(chosen))[rows], chosen[rows]
    texts = generate(
        model,
        [[tokenizer.end_of_text_id, *tokenizer.encode(prompt)] for prompt in chosen],
        row_numbers=numbers,
        new_tokens=new_tokens,
        context_length=context_length,
        end_of_text_id=tokenizer.end_of_text_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
    )
    return [
        {"prompt": prompt, "text": _decode_after(tokenizer, prompt, ids)}
        for prompt, ids in zip(chosen, texts, strict=True)
    ]


def _decode_after(tokenizer: Tokenizer, prompt: str, ids: list[int]) -> str:
    """Return the text of `ids` after a prompt."""
    # Many decoders drop a space that begins their text, so the new ids are decoded with the prompt.
    prompt_ids = tokenizer.encode(prompt)
    start, whole = tokenizer.decode(prompt_ids), tokenizer.decode([*prompt_ids, *ids])
    if not whole.startswith(start):
        return tokenizer.decode(ids)
    # Others drop the space that ends a prompt, and begin the next word with one.
    space = prompt[len(prompt.rstrip()) :]
    return whole[len(start) :].removeprefix("" if start.endswith(space) else space)
