"""The Triton kernels compile for GPUs that are not here, fit them, keep to registers and use their matrix units."""

import json
import os
import subprocess
import sys


def test_every_build_fits_without_spills_and_multiplies_on_the_matrix_units():
    path = os.pathsep.join(str(folder) for folder in sys.path if folder)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path}
    code = (
        "import json, triton_offline\n"
        "for build in triton_offline.builds(): print(json.dumps([build, triton_offline.problems(build)]))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    builds = [json.loads(line) for line in result.stdout.splitlines()]
    assert {build["target"] for build, _ in builds} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    assert {build["kernel"] for build, _ in builds} == {"maps_kernel", "lse_kernel", "sum_kernel"}
    assert not [(build, problems) for build, problems in builds if problems]
