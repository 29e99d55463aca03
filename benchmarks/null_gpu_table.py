"""Writes the tables of docs/gpu.md from what `null_gpu.py` has counted.

python benchmarks/null_gpu_table.py            # rewrites what stands between the two markers
python benchmarks/null_gpu_table.py --check    # exits 1 if the page says something else
"""

import json
from pathlib import Path

from table import keep_page

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "gpu.md", ROOT / "benchmarks" / "results" / "null_gpu.json"
STEPS = (
    "case",
    "kernels",
    "waits",
    "refused",
    "recompiled",
    "fp32 products",
    "peak",
    "plan",
    "moved",
)
ATTENTION = ("attention", "blocks", "launches", "refused", "peak")
PARTS = ("part of the run", "kernels", "waits", "refused", "to the host", "beside the step")


def build_tables(rows: dict[str, dict]) -> str:
    """Return the tables of the results, in Markdown."""
    steps = [step_cells(name, row) for name, row in rows.items() if "moved" in row]
    attention = [
        attention_cells(name, row) for name, row in rows.items() if "forward_blocks" in row
    ]
    parts = [cells for name, row in rows.items() for cells in part_cells(name, row)]
    tables = [(STEPS, steps), (ATTENTION, attention), (PARTS, parts)]
    return "\n\n".join(table(heading, cells) for heading, cells in tables if cells)


def table(heading: tuple[str, ...], rows: list[tuple]) -> str:
    """Return a table whose first column is text."""
    rule = "|---" + "|--:" * (len(heading) - 1) + "|"
    lines = (" | ".join(map(str, cells)) for cells in (heading, *rows))
    first, *rest = (f"| {line} |" for line in lines)
    return "\n".join([first, rule, *rest])


def step_cells(name: str, row: dict) -> tuple:
    """Return the figures of steps: counts of the last one, bytes in GB."""
    return (
        name,
        f"{row['kernels']:,}",
        sum(row["waits"].values()),
        sum(row["refused"].values()),
        row["recompiled"],
        row["products"].get("fp32", 0),
        f"{row['peak'] / 1e9:.2f}",
        f"{row['planned'] / row['peak'] - 1:+.1%}",
        f"{row['moved'] / 1e9:,.0f}",
    )


def attention_cells(name: str, row: dict) -> tuple:
    """Return the figures of attention alone."""
    refused, peak = sum(row["refused"].values()), row["peak"] / 1e9
    blocks, launches = row["forward_blocks"], row["forward_launches"]
    label = name.removeprefix("attention, ").replace(" 1 documents", " 1 document")
    return label, f"{blocks:,}", launches, refused, f"{peak:.2f}"


def part_cells(name: str, row: dict) -> list[tuple]:
    """Return the figures of the parts of a run, the largest of each kind."""
    cells = []
    for part, each in row.items():
        if part in ("outcome", "commit") or "outcome" not in row or not each:
            continue
        most = max(each, key=lambda calls: calls["kernels"])
        beside = max(calls["to_host_beside"] for calls in each)
        numbers = (sum(most["waits"].values()), sum(sum(c["refused"].values()) for c in each))
        label, kernels = f"{name}: {part} ({len(each)})", f"{most['kernels']:,}"
        cells.append(
            (label, kernels, *numbers, f"{most['to_host']:,} B", f"{beside / 1e6:,.0f} MB")
        )
    return cells


if __name__ == "__main__":
    counted = json.loads(RESULTS.read_text(encoding="utf-8"))
    keep_page(PAGE, build_tables(counted["rows"]), "null gpu")
