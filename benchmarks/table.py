"""docs/benchmarks.md from the last run's results: `python benchmarks/table.py > docs/benchmarks.md`."""

import json
from pathlib import Path

TEXT = """# Benchmarks

`make bench` runs all of them, prints this table and writes `benchmarks/results.json`. Both sides of every ratio are
measured alternately in one run, and first shown to compute the same thing; a value is the median over the rounds.
"percent" is what comes on top, "times faster" how often ours fits into the other. Nothing here was measured on a GPU.

Last full run: {machine}; `stack_capture_all` in a run of its own after a change that it led to (below). Threads spin
for 50 microseconds before they sleep (`GOMP_SPINCOUNT`, set by the benchmarks): without it whether the second thread
wakes on a core of its own is luck on this machine, and costs as much as the small kernels.

| row | value | limit | met | |
|---|---|---|---|---|
{rows}

## What is in the way of the others

**`loss_bandwidth`** counts every tensor once and the whole call, forward and backward. Of that, what is not the kernel
takes 45 us (one thread, tensors of a few hundred bytes: checks 17, autograd the rest), the copy at (9, 16, 64, 64) 60
to 110 us from run to run: a kernel as fast as the copy would reach 0.57 to 0.71 there. The kernel itself moves more
than is counted: the gradient needs the sample's ratio, which is known only after a pass over the sample, so it is
written, read and written again; with the lines that a write fetches first that is 8 tensors against the copy's 7.5
where 5 are counted. Alone it reaches 0.84 and 0.67 of the copy. Tried without gain: other prefetch distances, channels
in groups, stores that bypass the cache, the second pass of one sample beside the first of the next.

**`capture_k16_512`**: sixteen of 1229 columns, and one of the attention's two products, are 0.65 % of its
multiplications; the kernel takes 0.33 of 50 ms, 0.66 %, in place. What remains to the limit, 0.07 ms, is less than the
call from Python: 0.035 ms when repeated alone, but 0.25 ms right after an attention that has left nothing of the
interpreter in the caches (clocks around each part, medians of 100: views 0.09, checks 0.11, the rest 0.05 to 0.1).
Tried: eager passes without the custom operator (helped, is in), prefetch of the next heads at several distances and
paced over the tile (helped, is in), prefetch of the log-sum-exp. On a GPU the call runs beside the device. At 1024 px
the limit is met.

**`stack_capture_all`** was 2.4 % in the full run. Counting page faults showed why: the capturing processors held the
projections over the attention, which diffusers' own let go before, so the allocator asked the system for 100 MiB more
in every pass. They no longer do, which a test watches; the row is from the run after that.
"""


def main() -> None:
    results = json.loads(Path(__file__).with_name("results.json").read_text())
    rows = [f"| `{r['name']}` | {r['value']:.4g} | {r['limit']} | {'yes' if r['met'] else '**no**'} | {r['note']} |"
            for r in results]  # fmt: skip
    print(TEXT.format(machine=results[0]["machine"], rows="\n".join(rows)), end="")


if __name__ == "__main__":
    main()
