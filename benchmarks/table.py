"""docs/benchmarks.md from the last run's results: `python benchmarks/table.py > docs/benchmarks.md`."""

import json
from pathlib import Path

TEXT = """# Benchmarks

`make bench` runs all of them, prints this table and writes `benchmarks/results.json`. Both sides of every ratio are
measured alternately in one run, and first shown to compute the same thing; a value is the median over the rounds.
"percent" is what comes on top, "times faster" how often ours fits into the other. Nothing here was measured on a GPU.

Last full run: {machine}; `shapes_vs_eager_loop` in a run of its own after it.

| row | value | limit | met | |
|---|---|---|---|---|
{rows}

## What is in the way of the others

**`loss_bandwidth`** counts every tensor once. The operator reads all but the old mean twice, because the gradient
needs the sample's ratio, which is known only after a pass over the sample; the note gives its rate without Python and
autograd, which at these sizes cost as much as the kernel. One pass that reads the four inputs and writes the
gradient, and computes nothing, takes the time of the copy; the second pass and the weights come on top. Tried without
gain: other prefetch distances, channels in groups, stores that bypass the cache, the second pass of one sample beside
the first of the next.

**`capture_k16_512`, `capture_k64_512`**: sixteen of 1229 columns, and one of the attention's two products, are 0.65 %
of its multiplications, sixty-four are 2.6 %: the limits leave nothing for reading the queries again, exponentials and
the call from Python, which at 512 px are as much as the products. Tried: eager passes without the custom operator
(helped, is in), prefetch of the next heads at several distances and paced over the tile (helped, is in), prefetch of
the log-sum-exp. At 1024 px, where the attention takes twelve times as long and the maps four times, the limit is met.

**`stack_capture_all`** was 0.49 % in the full run before this one, and does not agree with `iteration_wall`, which
captures the same layers; the difference of two passes of 2 s varies by more than the limit from run to run.
"""


def main() -> None:
    results = json.loads(Path(__file__).with_name("results.json").read_text())
    rows = [f"| `{r['name']}` | {r['value']:.4g} | {r['limit']} | {'yes' if r['met'] else '**no**'} | {r['note']} |"
            for r in results]  # fmt: skip
    print(TEXT.format(machine=results[0]["machine"], rows="\n".join(rows)), end="")


if __name__ == "__main__":
    main()
