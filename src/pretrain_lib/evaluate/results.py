"""Results of lm-eval on the disk and as a table. Floor 1."""

import json
from pathlib import Path

from pretrain_lib.data.shards import write_atomically


def write_results(results: dict, path: Path) -> None:
    """Write results as lm-eval's CLI does: one JSON, and `samples_TASK.jsonl` beside it.

    The latter only where the results hold samples; log-likelihoods in it are strings, as there.
    """
    from lm_eval.utils import handle_non_serializable, hash_string

    samples = results.get("samples", {})
    kept = {key: value for key, value in results.items() if key != "samples"}
    kept["task_hashes"] = {
        task: hash_string(
            "".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in rows)
        )
        for task, rows in samples.items()
    }
    text = json.dumps(kept, indent=2, default=handle_non_serializable, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())
    for task, rows in samples.items():
        lines = [
            json.dumps(_plain_sample(row), default=handle_non_serializable, ensure_ascii=False)
            for row in rows
        ]
        write_atomically(
            path.with_name(f"samples_{task}.jsonl"), ("\n".join(lines) + "\n").encode()
        )


def format_table(results: dict) -> str:
    """Return the scores as an aligned table: task, metric, value, stderr (empty if not known)."""
    rows = [("task", "metric", "value", "stderr")]
    for task, scores in (results["results"] | results.get("groups", {})).items():
        for key, value in scores.items():
            metric, comma, kind = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            error = scores.get(f"{metric}_stderr,{kind}")
            label = metric if kind == "none" else f"{metric} ({kind})"
            rows.append((task, label, _number(value), _number(error)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        f"{task:<{widths[0]}}  {metric:<{widths[1]}}  {value:>{widths[2]}}  {error:>{widths[3]}}"
        for task, metric, value, error in rows
    )


def _plain_sample(row: dict) -> dict:
    """Return a sample in the types that lm-eval's CLI writes, which `datasets` can load."""
    from lm_eval.utils import sanitize_list

    arguments = {
        f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(argument)}
        for i, argument in enumerate(row["arguments"])
    }
    return row | {
        "arguments": arguments,
        "resps": sanitize_list(row["resps"]),
        "filtered_resps": sanitize_list(row["filtered_resps"]),
        "target": str(row["target"]),
    }


def _number(value: float | str | None) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else ""
