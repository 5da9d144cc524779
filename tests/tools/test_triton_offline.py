"""The Triton kernels compile for GPUs that are not here, fit them, keep to registers and use their matrix units; and
what varies with prompts compiles no kernel of its own."""

import json
import os
import subprocess
import sys

import pytest


def compiling(code: str) -> list:
    """The JSON lines that the code prints in a process in which Triton compiles."""
    path = os.pathsep.join(str(folder) for folder in sys.path if folder)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    "targets", [["sm_90", "gfx942"], pytest.param(["sm_80", "sm_100"], marks=pytest.mark.slow)], ids="-".join
)
def test_every_build_fits_without_spills_and_multiplies_on_the_matrix_units(targets):
    builds = compiling(
        "import json, triton_offline\n"
        f"for build in triton_offline.builds({targets}): print(json.dumps([build, triton_offline.problems(build)]))"
    )
    assert {build["target"] for build, _ in builds} == {*targets}
    kernels = {"maps_kernel", "lse_kernel", "sum_kernel", "step_kernel", "allocate_kernel", "ratios_kernel"}
    kernels |= {"statistics_kernel", "gradient_kernel", "sums_kernel"}
    assert {build["kernel"] for build, _ in builds} == kernels
    assert not [(build, problems) for build, problems in builds if problems]


def test_prompts_compile_few_kernels():
    """Concepts and tokens of any number: what is compiled follows the blocks of columns (16, 32, 64), and whether one
    program has all heads of a row or several share them."""
    code = """
import json, torch, triton_offline
from star_kernels.triton import attention_maps as kernels
names = ("maps_kernel", "lse_kernel", "sum_kernel")
for name in names: setattr(kernels, name, triton_offline.Recorder(getattr(kernels, name)))
query, key = torch.zeros(2, 1, 24, 256, 64, dtype=torch.bfloat16).unbind(0)
for processors in (1, 1000):
    kernels.processors = lambda device: processors
    for concepts in range(1, 9):
        for slots in range(1, 17):
            index = torch.zeros(1, concepts, slots, dtype=torch.int64)
            kernels.launch(query, key, index, torch.ones(index.shape), None, 1.0, None)
    print(json.dumps([len(getattr(kernels, name).variants) for name in names]))
"""
    alone, both = compiling(code)
    assert alone == [4, 1, 1]  # more than 64 columns: two blocks
    assert both == [6, 1, 2]


def test_what_is_launched_compiles_at_the_smallest_sizes_too():
    """A size of 1 is a constant for the compiler, where it is not told otherwise."""
    code = """
import json, torch, triton, triton_offline
from star_kernels.triton import allocate, attention_maps, gaussian_step, nft_loss, policy_loss
triton.runtime.driver.set_active(triton_offline.Driver())
for shape in ((1, 1, 1, 1), (2, 3, 1, 5, 7), (1, 33, 16)):
    batch, each = shape[0], (*shape[:1], *shape[2:]) if len(shape) != 3 else shape[:2]
    x, weights, fields = torch.rand(shape), torch.rand(each), [torch.rand(1).expand(batch) for _ in range(6)]
    gaussian_step.launch(x.bfloat16(), x, x, *fields[:3])
    gaussian_step.launch(x, x.half(), None, *fields[:3], x.half(), 4.5, torch.arange(batch))
    for ratio in ("token", "location", "sample"):
        for dtype in (torch.float16, torch.float64):
            old = (x, None, None, None) if ratio == "token" else (None, weights, x, torch.rand(batch))
            given = (x.to(dtype), x, x, *fields, torch.rand(batch), weights, *old, ratio, 0.1, 0.1, 5.0, 0.1)
            loss, statistics, log_ratio = policy_loss.launch(*given, ratio == "token")
            policy_loss.launch_gradient(loss, log_ratio, *given, ratio == "token")
    for dtype, adaptive in ((torch.float16, True), (torch.float64, False)):
        options = (torch.rand(batch), None, None) if adaptive else (weights, weights, x)
        given = (x.to(dtype), x, x, x, torch.rand(batch), *options)
        loss, statistics, errors = nft_loss.launch(*given, 0.5, adaptive, 1e-5, 5.0, 0.1)
        nft_loss.launch_gradient(loss, errors, *given, 0.5, adaptive, 1e-5, 5.0, 0.1)
for rows, columns, concepts in ((1, 1, 1), (1, 7, 2), (3, 5, 0)):
    for combine, smooth, sharpen in (("mean", 0.0, 1.0), ("max", 1.5, 2.0)):
        maps = torch.rand(1, concepts, rows * columns).bfloat16()
        allocate.launch(maps, rows, columns, combine, smooth, sharpen, 4.0, 0.5, 1)
        allocate.launch(maps.double(), rows, columns, combine, smooth, sharpen, 4.0, 0.5, 3)
for heads, queries, slots in ((1, 1, 1), (11, 70, 40)):
    query = torch.rand(1, heads, queries, 16)
    index = torch.zeros(1, 2, slots, dtype=torch.int64)
    attention_maps.launch(query, query, index, None, None, 1.0, None)
    attention_maps.launch(query, query, index, torch.ones(index.shape), query[..., 0], 1.0, torch.rand(heads))
print(json.dumps(True))
"""
    assert compiling(code) == [True]
