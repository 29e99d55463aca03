"""lm-eval's model interface for a model in memory, with the scores of lm-eval's own `HFLM`."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    Collator,
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from pretrain_lib.data.text.tokenizer import Tokenizer
from pretrain_lib.evaluate.item_faults import Request, check_requests, name_item
from pretrain_lib.evaluate.scoring import Score, score_endings
from pretrain_lib.models.flops import count_parameters
from pretrain_lib.models.generation import generate
from pretrain_lib.models.interface import Model
from pretrain_lib.models.modes import evaluation_mode

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedTokenizerFast

Outcomes = Generator[tuple[int, Any], None, None]  # (index of the item, outcome)
Deal = Callable[["LiveModel", str, Sequence], Outcomes]

NEW_TOKENS = 256  # default number of tokens to generate, as in HFLM
SAMPLING = ("temperature", "top_k", "top_p")


class LiveModel(TemplateLM):
    """A model in memory for `lm_eval.evaluate`.

    Tokenization, prefixes and truncation are those of `HFLM`. The model's training mode and
    gradients and the random number generators are left unchanged between calls. `deal` replaces
    `do`, to distribute work over processes.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: "PreTrainedTokenizerFast",
        *,
        batch_size: int = 8,
        deal: Deal | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._deal = deal or LiveModel.do
        self._device = model.head_weight.device
        self._prefix = tokenizer.decode(self.prefix_token_id)
        self._encoded: dict[str, list[int]] = {}  # cache of the texts of the current requests
        self._asked: Sequence[Instance] = ()  # the current requests

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token used as the context of a text without one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The context length in tokens."""
        return self.model.config.context_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: object
    ) -> list[int]:
        """Tokenize a text, adding special tokens unless it already begins with the prefix token."""
        if add_special_tokens is None:
            if string in self._encoded:
                return self._encoded[string]
            add_special_tokens = not string.startswith(self._prefix)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def do(self, work: str, items: Sequence) -> Outcomes:
        """Do some work on each of `items`; yield `(index, outcome)`.

        `work` is "score", for items of context and ending in tokens, or "write", which generates a
        continuation for items that are batches of texts.
        """
        with evaluation_mode(self.model):
            if work == "score":
                yield from score_endings(self.model, items, batch_size=self.batch_size)
                return
            for number, batch in enumerate(items):
                yield number, self._write(*batch)

    def loglikelihood(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[Score]:
        """Return the log-likelihood in nats of each ending, and whether it is greedy.

        Tokenizes all distinct texts in one batch first; lm-eval would tokenize them one by one.
        """
        texts = [part for c, e in (r.args for r in requests) for part in (c.rstrip(), c + e) if c]
        self._encoded, self._asked = self._encode_all(dict.fromkeys(texts)), requests
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._encoded, self._asked = {}, ()

    def _encode_all(self, texts: Iterable[str]) -> dict[str, list[int]]:
        encoded = {}
        for special in (True, False):
            group = [text for text in texts if text.startswith(self._prefix) is not special]
            if group:
                output = self.tokenizer(
                    group, add_special_tokens=special, return_attention_mask=False, verbose=False
                )
                encoded |= zip(group, output["input_ids"], strict=True)
        return encoded

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: object
    ) -> list[Score]:
        scores: list[Score] = [(0.0, False)] * len(requests)
        pairs = [(context, ending) for _, context, ending in requests]
        check_requests(self._asked, requests, self.max_length)
        with closing(self._deal(self, "score", pairs)) as numbered:
            for number, score in tqdm(
                numbered, total=len(requests), disable=disable_tqdm, desc="Scoring"
            ):
                scores[number] = score
                if texts := requests[number][0]:
                    self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def loglikelihood_rolling(
        self, requests: list["Instance"], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of each text in nats, computed over disjoint windows.

        The last window gets as much context as fits.
        """
        windows: list[Request] = []
        owners = []
        for number, request in enumerate(requests):
            text_windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            text_windows = [(None, *make_disjoint_window(window)) for window in text_windows]
            windows += text_windows
            owners += [number] * len(text_windows)
        totals = [0.0] * len(requests)
        self._asked = [requests[number] for number in owners]
        try:
            scores = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        finally:
            self._asked = ()
        for number, (nats, _) in zip(owners, scores, strict=True):
            totals[number] += nats
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list["Instance"], disable_tqdm: bool = False) -> list[str]:
        """Generate a continuation of each context, up to a stop sequence of the task."""
        # Batches requests of equal settings, longest context first, and restores the order later.
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda arguments: -len(arguments[0]),
            group_by="gen_kwargs",
            group_fn=lambda arguments: arguments[1],
        )
        groups = [*order.get_batched(n=self.batch_size)]
        batches = [
            (seed, [context for context, _ in batch], *self._settings(requests, batch[0][1]))
            for seed, batch in enumerate(groups)
        ]
        texts: dict[int, list[str]] = {}
        bar = tqdm(total=len(requests), disable=disable_tqdm, desc="Generating")
        with bar, closing(self._deal(self, "write", batches)) as done:
            for number, written in done:
                texts[number] = written
                for request, text in zip(groups[number], written, strict=True):
                    self.cache_hook.add_partial("generate_until", request, text)
                bar.update(len(written))
        return order.get_original([text for number in sorted(texts) for text in texts[number]])

    def _settings(
        self, requests: list["Instance"], settings: dict
    ) -> tuple[list[str], int, dict[str, float]]:
        """Return what `_read_settings` does; its errors name the first request of `settings`."""
        try:
            return self._read_settings(settings)
        except ValueError as error:
            first = next(request for request in requests if request.args[1] == settings)
            raise ValueError(f"{name_item(first)}: {error}") from error

    def _read_settings(self, settings: dict) -> tuple[list[str], int, dict[str, float]]:
        """Return the stop sequences, the maximum number of new tokens, and the sampling options.

        Raises ValueError for options that are not supported.
        """
        options = normalize_gen_kwargs(settings, NEW_TOKENS)
        end = self.tokenizer.decode(self.eot_token_id)
        stops = [stop for stop in handle_stop_sequences(options.pop("until"), end) if stop]
        new_tokens = options.pop("max_gen_toks")
        options.pop("do_sample")  # lm-eval sets the temperature to 0 if it is false
        unknown = sorted(set(options) - set(SAMPLING))
        if unknown:
            raise ValueError(
                f"generation_kwargs={settings}: {', '.join(unknown)} is not supported, only "
                f"{', '.join(SAMPLING)}; `pretrain eval --harness` generates by lm-eval's own model"
            )
        if new_tokens >= self.max_length:
            raise ValueError(
                f"generation_kwargs={settings}: max_gen_toks={new_tokens} must be less than "
                f"model.context_length={self.max_length}"
            )
        return stops, new_tokens, {"temperature": 0.0} | options

    def _write(
        self,
        seed: int,
        contexts: list[str],
        stops: list[str],
        new_tokens: int,
        options: dict[str, float],
    ) -> list[str]:
        decode = self.tokenizer.decode
        rows = generate(
            self.model,
            [self.tok_encode(context)[new_tokens - self.max_length :] for context in contexts],
            new_tokens=new_tokens,
            context_length=self.max_length,
            end_of_text_id=self.eot_token_id,
            seed=seed,
            is_done=lambda ids: any(stop in decode(ids) for stop in stops),
            **options,
        )
        return [
            postprocess_generated_text(decode(ids, skip_special_tokens=True), stops, None)
            for ids in rows
        ]

    def get_model_info(self) -> dict:
        """Return the model information that lm-eval records, without padded vocabulary rows."""
        return {
            "model_num_parameters": count_parameters(self.model),
            "model_dtype": self.model.head_weight.dtype,
        }


def transformers_tokenizer(tokenizer: Tokenizer) -> "PreTrainedTokenizerFast":
    """Convert a tokenizer to the one that transformers loads from the folders written here."""
    from transformers import AutoTokenizer

    with TemporaryDirectory() as folder:
        tokenizer.save(Path(folder))
        return AutoTokenizer.from_pretrained(folder)
