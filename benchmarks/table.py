"""Fills the table of docs/benchmarks.md with the last run's results: `python benchmarks/table.py`."""

import json
from pathlib import Path

from star import document

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
RESULTS = Path(__file__).with_name("results.json")


def table(results: list[dict]) -> str:
    """Markdown: the machine and a row for each result, as conftest.py writes them to results.json."""
    lines = [f"Measured on: {results[0]['machine']}.", "", "| row | value | limit | met | |", "|---|---|---|---|---|"]
    for r in results:
        met = "yes" if r["met"] else "**no**"
        lines.append(f"| `{r['name']}` | {r['value']:.4g} | {r['limit']} | {met} | {r['note']} |")
    return "\n".join(lines)


def main() -> None:
    results = json.loads(RESULTS.read_text())
    document.fill(DOCUMENT, {"results of the benchmarks": table(results)})


if __name__ == "__main__":
    main()
