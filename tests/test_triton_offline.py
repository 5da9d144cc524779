"""The Triton kernels compile for GPUs that are not here, fit them, keep to registers and use their matrix units."""

import json
import os
import subprocess
import sys
from pathlib import Path

# Bytes of shared memory that one block may have.
SHARED = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def test_every_build_fits_without_spills_and_multiplies_on_the_matrix_units():
    script = Path(__file__).with_name("triton_offline.py")
    path = os.pathsep.join(str(folder) for folder in sys.path if folder)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    result = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    builds = [json.loads(line) for line in result.stdout.splitlines()]
    assert {build["target"] for build in builds} == set(SHARED)
    assert {build["kernel"] for build in builds} == {"maps_kernel", "lse_kernel"}
    wrong = [
        build for build in builds if build["local"] or not build["matrix"] or build["shared"] > SHARED[build["target"]]
    ]
    assert not wrong
