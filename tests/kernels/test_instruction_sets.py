"""The tests above used one of the compiled instruction sets; here each other runs them, in a process of its own."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest

from star_kernels import native
from star_kernels.ops import OPERATORS


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(name):
    info = native.build_info()
    if name not in info.get("instruction_sets", "").split() or name == info["instruction_set_in_use"]:
        pytest.skip(f"{name} is not compiled, or is the one in use")
    environment = os.environ | {"STAR_ISA": name, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = functools.partial(subprocess.run, capture_output=True, text=True, env=environment)
    code = "from star_kernels import native; print(native.build_info()['instruction_set_in_use'])"
    if run([sys.executable, "-c", code]).stdout.strip() != name:
        pytest.skip(f"this processor has no {name}")
    files = [Path(__file__).with_name(f"test_{operator}.py") for operator in OPERATORS]
    tests = "native and not gpu and not inductor and not opcheck"
    result = run([sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--capture=sys", "-k", tests, *files])
    assert result.returncode == 0, result.stdout + result.stderr
