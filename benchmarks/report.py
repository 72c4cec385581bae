"""Copies the tables of result files into pages, between markers, so that no figure is typed by hand.

    python benchmarks/report.py [--check] [PAGE ...]        (default: README.md)

A page asks for the table of `benchmarks/results/NAME.json` with two comments, and what lies between
them is replaced:

    <!-- benchmark: NAME -->
    <!-- end -->

The result file holds it ready: `"table": {"columns": [...], "rows": [[...], ...]}`, texts as they
shall stand, beside `question`, `date` and `machine`. `--check` writes nothing and fails if a page is
out of date.
"""

import argparse
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MARKED = re.compile(r"(<!-- benchmark: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(name: str, results: Path = HERE / "results") -> str:
    """The Markdown table of a result file, with a line that says where it comes from.

    Raises:
        ValueError: when there is no such file, or it holds no table.
    """
    path = results / f"{name}.json"
    if not path.exists():
        raise ValueError(f"smcscale: {path.name} is not in benchmarks/results: run the benchmark.")
    result = json.loads(path.read_text(encoding="utf-8"))
    if "table" not in result:
        raise ValueError(f'smcscale: {path.name} holds no "table" of columns and rows.')
    columns, rows = result["table"]["columns"], result["table"]["rows"]
    wrong = [row for row in rows if len(row) != len(columns)]
    if wrong:
        raise ValueError(f"smcscale: a row of {path.name} does not fit its columns: {wrong[0]}.")
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    text = "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
    found = result.get("machine", {})
    cores = found.get("cores")
    where = f"{cores} core{'s' * (cores > 1)}, {found['cpu']}" if cores else ""
    source = ", ".join(
        part for part in (f"`benchmarks/results/{path.name}`", result.get("date"), where) if part
    )
    return f"{text}\n\n{source}.\n"


def filled(text: str, results: Path = HERE / "results") -> str:
    """A page with every marked table brought up to date."""
    return MARKED.sub(lambda m: m.group(1) + table(m.group(2), results) + m.group(3), text)


def main() -> int:
    """Fill the pages, or check them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    parser.add_argument("pages", nargs="*", type=Path, default=[ROOT / "README.md"])
    options = parser.parse_args()
    stale = []
    for page in options.pages:
        before = page.read_text(encoding="utf-8")
        after = filled(before)
        if before != after:
            stale.append(page.name)
            if not options.check:
                page.write_text(after, encoding="utf-8")
                print(f"filled {page.name}")
    if options.check and stale:
        print(f"out of date: {', '.join(stale)}; run: python benchmarks/report.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
