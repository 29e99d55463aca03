"""Make two lm-eval tasks from the held-out text of a prepared folder; they need no network.

They are plain YAML and JSONL files, so `lm_eval --include_path FOLDER` runs them too.
"""

import glob
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from pretrain_lib.data.permutation import derive_keys, permute
from pretrain_lib.data.prepare.job import TOKENIZER_FOLDER
from pretrain_lib.data.text.tokenizer import load_tokenizer
from pretrain_lib.data.tokens.arrays import open_split
from pretrain_lib.data.tokens.shards import read_manifest
from pretrain_lib.data.tokens.verify import check_tokenizer
from pretrain_lib.files.outputs import check_folder
from pretrain_lib.files.writes import make_folder, write_atomically

CHOICE_TASK = "heldout_choice"
PERPLEXITY_TASK = "heldout_perplexity"
NUM_ENDINGS = 4
DOCUMENT_TOKENS = 50_000  # limit on the tokens read from one document
STRETCHES_PER_ITEM = 10  # enough stretches to choose from: stop reading
# A single space between two words, as lm-eval puts it between context and ending.
WORD_GAP = re.compile(r"(?<=\S) (?=\S)")
METRICS = {
    CHOICE_TASK: ("acc", "acc_mutual_info"),
    PERPLEXITY_TASK: ("word_perplexity", "byte_perplexity", "bits_per_byte"),
}


@dataclass(frozen=True)
class Stretch:
    """A passage of a document, split into context and ending at a space, which is dropped."""

    context: str
    ending: str


def write_local_tasks(
    prepared: Path,
    out: Path,
    *,
    items: int = 200,
    seed: int = 0,
    context_characters: int = 280,
    ending_characters: int = 80,
    documents: int = 50,
    document_characters: int = 4000,
) -> list[str]:
    """Write two tasks from the validation split of a prepared folder; return their names.

    `heldout_choice` has `items` contexts with four endings each. One ending is the text that
    follows; the others follow other contexts, so only the context tells them apart, and chance is
    25 %. Its main metric is lm-eval's `acc_mutual_info`, which ranks endings by how much the
    context raises their likelihood; `acc` favors endings that are likely anywhere. All endings have
    equal length, so `acc_norm` would equal `acc`. `heldout_perplexity` has the first
    `document_characters` characters of at most `documents` documents. Both depend only on the text
    and the seed. Raises ValueError for too little held-out text.
    """
    check_folder(out, named="out=", kind="a folder of these tasks", is_ours=_has_tasks)
    texts, stretches = [], {}
    for text in read_documents(prepared, seed=seed):
        if len(texts) < documents:
            texts.append(text[:document_characters])
        for stretch in cut_stretches(text, context_characters, ending_characters):
            stretches.setdefault(stretch.ending, stretch)  # the endings of an item must differ
        if len(texts) >= documents and len(stretches) >= STRETCHES_PER_ITEM * items:
            break
    if len(stretches) < max(items, NUM_ENDINGS):
        raise ValueError(
            f"items={items} needs {max(items, NUM_ENDINGS)} stretches of "
            f"{context_characters} + {ending_characters} characters, but the held-out text of "
            f"{prepared} gives {len(stretches)}; hold out more (data.validation) or lower items"
        )
    rows = choice_items(list(stretches.values()), items=items, seed=seed)
    _write_task(out, CHOICE_TASK, rows)
    _write_task(out, PERPLEXITY_TASK, [{"text": text} for text in texts])
    return [CHOICE_TASK, PERPLEXITY_TASK]


def read_documents(prepared: Path, *, seed: int) -> Iterator[str]:
    """Yield the text of the held-out documents of a prepared folder, in shuffled order."""
    tokens = open_split(prepared, "validation")
    if not len(tokens):
        raise ValueError(
            f"data.path={prepared} has no held-out text; prepare it with a validation share "
            f"(data.validation=hash)"
        )
    check_tokenizer(prepared, read_manifest(prepared))
    tokenizer = load_tokenizer(prepared / TOKENIZER_FOLDER)
    bounds = np.concatenate([[0], tokens.document_ends(0, len(tokens)), [len(tokens)]])
    num_documents = len(bounds) - 1
    keys = derive_keys("local_tasks", seed)
    for document in permute(np.arange(num_documents), size=num_documents, keys=keys):
        start, end = bounds[document] + 1, bounds[document + 1]  # the first id is end-of-text
        count = min(int(end - start), DOCUMENT_TOKENS)
        # A multi-byte character may be split where reading stops.
        yield tokenizer.decode(tokens.read(int(start), count)).rstrip("\N{REPLACEMENT CHARACTER}")


def cut_stretches(text: str, context_characters: int, ending_characters: int) -> Iterator[Stretch]:
    """Yield non-overlapping stretches of a text.

    Context and ending each begin with a word after a single space. The ending has exactly
    `ending_characters` characters, the context between `context_characters // 2` and
    `context_characters`.
    """
    gaps = np.array([match.start() for match in WORD_GAP.finditer(text)], dtype=np.int64)
    first = 0  # the gap before the context
    while first < len(gaps):
        start = gaps[first] + 1
        last = np.searchsorted(gaps, start + context_characters, side="right") - 1
        end = gaps[last] + 1 + ending_characters
        if gaps[last] - start >= context_characters // 2 and end <= len(text):
            yield Stretch(text[start : gaps[last]], text[gaps[last] + 1 : end])
            first = np.searchsorted(gaps, end)
        else:
            first += 1


def choice_items(stretches: Sequence[Stretch], *, items: int, seed: int) -> list[dict]:
    """Return `items` rows of `context`, `choices` and `label`.

    The wrong choices are endings of other stretches. All labels occur equally often, up to one.
    """
    generator = np.random.default_rng(seed)
    labels = (generator.permutation(items) % NUM_ENDINGS).tolist()
    chosen = generator.permutation(len(stretches))[:items]
    rows = []
    for right, label in zip(chosen, labels, strict=True):
        # Draw among the other stretches: indices from the right one on are shifted by one.
        wrong = generator.choice(len(stretches) - 1, size=NUM_ENDINGS - 1, replace=False)
        endings = [stretches[i + (i >= right)].ending for i in wrong]
        endings.insert(label, stretches[right].ending)
        rows.append({"context": stretches[right].context, "choices": endings, "label": label})
    return rows


def _has_tasks(out: Path) -> bool:
    return any((out / f"{task}.jsonl").is_file() for task in METRICS)


def _write_task(out: Path, task: str, rows: Sequence[dict]) -> None:
    """Write `TASK.jsonl`, and `TASK.yaml`, which refers to it by its absolute path."""
    make_folder(out)
    data = out.resolve() / f"{task}.jsonl"
    write_atomically(data, "".join(json.dumps(row) + "\n" for row in rows).encode())
    if task == CHOICE_TASK:
        fields = {
            "output_type": "multiple_choice",
            "doc_to_text": "context",
            "doc_to_choice": "choices",
            "doc_to_target": "label",
            "target_delimiter": " ",
        }
    else:
        fields = {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            # A column name, not a template: lm-eval may parse rendered text as a Python list.
            "doc_to_target": "text",
        }
    aggregation = {"acc": "mean", "acc_mutual_info": "mean", "bits_per_byte": "bits_per_byte"}
    config = {
        "task": task,
        "dataset_path": "json",
        # `datasets` takes the name for a pattern: brackets in it must stand for themselves.
        "dataset_kwargs": {"data_files": {"validation": glob.escape(str(data))}},
        "validation_split": "validation",
        **fields,
        "metric_list": [
            {
                "metric": metric,
                "aggregation": aggregation.get(metric, "weighted_perplexity"),
                "higher_is_better": task == CHOICE_TASK,
            }
            for metric in METRICS[task]
        ],
        "metadata": {"version": 1.0},
    }
    text = yaml.safe_dump(config, sort_keys=False)
    write_atomically(out / f"{task}.yaml", text.encode())
