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
BEGIN, END = "<!-- performance -->", "<!-- /performance -->"
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


def insert_table(text: str, table: str) -> str:
    """Return a text with the table between its markers."""
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    changed, count = pattern.subn(lambda _: f"{BEGIN}\n{table}\n{END}", text)
    if count != 1:
        sys.exit(f"error: {PAGE} must have {BEGIN} and {END} once; it has them {count} times")
    return changed


def main() -> None:
    """Write the table of performance, or check it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 if it is not up to date")
    options = parser.parse_args()
    text = PAGE.read_text(encoding="utf-8")
    changed = insert_table(text, build_table(RESULTS))
    if not options.check:
        PAGE.write_text(changed, encoding="utf-8")
    elif changed != text:
        sys.exit("error: docs/benchmarks.md is not up to date: run python benchmarks/table.py")


if __name__ == "__main__":
    main()
