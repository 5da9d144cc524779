"""docs/benchmarks.md from the last run's results: `python benchmarks/table.py > docs/benchmarks.md`."""

import json
from pathlib import Path

TEXT = """# Benchmarks

`make bench` runs all of them, prints this table and writes `benchmarks/results.json`. Both sides of every ratio are
measured alternately in one run, and first shown to compute the same thing; a value is the median over the rounds.
"percent" is what comes on top, "times faster" how often ours fits into the other. Nothing here was measured on a GPU.

Last full run: {machine}.

| row | value | limit | met | |
|---|---|---|---|---|
{rows}
"""


def main() -> None:
    results = json.loads(Path(__file__).with_name("results.json").read_text())
    rows = [f"| `{r['name']}` | {r['value']:.4g} | {r['limit']} | {'yes' if r['met'] else '**no**'} | {r['note']} |"
            for r in results]  # fmt: skip
    print(TEXT.format(machine=results[0]["machine"], rows="\n".join(rows)), end="")


if __name__ == "__main__":
    main()
