"""Writes the table of docs/benchmarks.md from `benchmarks/results`: every figure with a goal.

python benchmarks/table.py            # rewrites what stands between the two markers
python benchmarks/table.py --check    # exits 1 if the page says something else
"""

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs" / "benchmarks.md", ROOT / "benchmarks" / "results"
REPOSITORY = "https://github.com/pretrain-lib/pretrain_lib/blob/main"
# Left out is what other pages say: data, checkpoints, kills, growth.
TABLED = ("throughput", "memory", "loss", "attention", "startup", "overhead", "evaluation")
SIGNS = {">=": "at least", "<": "below", "<=": "at most"}


def build_table(results: Path) -> str:
    """Return the table of the results on speed and memory, in Markdown."""
    lines = ["| what | goal | measured | met | where, when |", "|---|---|---|---|---|"]
    for path in sorted(path for name in TABLED for path in results.glob(f"{name}*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        where = describe_origin(path, report)
        goals = [row for row in report["rows"] if row["goal"]]
        lines += [format_row(path.stem, row, where) for row in goals]
    return "\n".join(lines)


def describe_origin(path: Path, report: dict) -> str:
    """Return the machine and the day of a result, as a link to its file."""
    machine, day = report["machine"], report["run"]["started"][:10]
    name = machine.get("gpu") or f"{machine['cores']} cores of {machine['cpu']}"
    return f"[{name}, {day}]({REPOSITORY}/benchmarks/results/{path.name})"


def format_row(benchmark: str, row: dict, where: str) -> str:
    """Return a line of the table."""
    kind, sign, bound = row["goal"].split()
    unit = "x" if kind == "ratio" else row["unit"]
    figure = row["ratio"] if kind == "ratio" else row["median"]
    measured = f"{figure:,.0f}" if figure >= 1000 else f"{figure:.3g}"
    goal = f"{SIGNS[sign]} {float(bound):,g} {unit}"
    met = "yes" if row["met"] else "**no**"
    section = row["section"].removesuffix(" goals")
    what = f"{benchmark.partition('_')[0]} {section}, {row['name']}"
    return f"| {what} | {goal} | {measured} {unit} | {met} | {where} |"


def insert_table(text: str, table: str, name: str) -> str:
    """Return a text with the table between the markers of its name."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
    changed, count = pattern.subn(lambda _: f"{begin}\n{table}\n{end}", text)
    if count != 1:
        sys.exit(f"error: the page must have {begin} and {end} once; it has them {count} times")
    return changed


def keep_page(page: Path, table: str, name: str) -> None:
    """Write a table into a page, or with the flag `--check` exit 1 if it is not there."""
    parser = argparse.ArgumentParser(description=f"Write the tables of {page.name}, or check them.")
    parser.add_argument("--check", action="store_true", help="exit 1 if they are not up to date")
    options = parser.parse_args()
    text = page.read_text(encoding="utf-8")
    changed = insert_table(text, table, name)
    if not options.check:
        page.write_text(changed, encoding="utf-8")
    elif changed != text:
        script = f"benchmarks/{Path(sys.argv[0]).name}"
        sys.exit(f"error: docs/{page.name} is not up to date: run python {script}")


if __name__ == "__main__":
    keep_page(PAGE, build_table(RESULTS), "performance")
