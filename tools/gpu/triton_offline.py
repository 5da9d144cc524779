"""Compiles the Triton kernels for GPUs that are not here and prints, as JSON lines, what each build needs.

Runs in a process of its own (`python tools/gpu/triton_offline.py`): Triton fixes at import whether it interprets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from occupancy import PROCESSORS, occupancy
from star_kernels.triton import attention_maps as kernels

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_INSTRUCTIONS = r"\bHMMA\.|\bHGMMA\.|\bUTC\w*MMA|v_mfma"
VECTORS = r"\b(?:LDG|LDGSTS|STG)(?:\.\w+)*\.128|(?:global|buffer)_(?:load|store)_dwordx4"
ALIGNED = {
    *("query", "key", "index", "weight", "lse", "head_weight", "partial", "maps"),
    *("query_b", "query_h", "query_n", "key_b", "key_h", "key_s", "lse_b", "lse_h", "elements"),
}
SIZES = {"bf16": 2, "fp32": 4}  # bytes of an element
# kernel, type of query and key, channels of a head, columns: what SD3 (64) and FLUX (128) launch
CASES = (
    (kernels.maps_kernel, "bf16", 64, 16),
    (kernels.maps_kernel, "bf16", 128, 16),
    (kernels.maps_kernel, "bf16", 128, 64),
    (kernels.maps_kernel, "fp32", 64, 16),
    (kernels.maps_kernel, "fp32", 128, 64),
    (kernels.lse_kernel, "bf16", 64, 0),
    (kernels.lse_kernel, "bf16", 128, 0),
    (kernels.lse_kernel, "fp32", 128, 0),
    (kernels.sum_kernel, "fp32", 0, 0),
)


def source(kernel, dtype: str, precision: str, width: int, columns: int, queries: int) -> ASTSource:
    """What a launch on contiguous heads would compile: unit strides constant, other addresses divisible by 16."""
    constants = {"query_d": 1, "key_d": 1, "D": width, "PRECISION": precision, "BLOCK_N": queries}
    constants["BLOCK_D"] = kernels.block_width(width, SIZES[dtype], precision)
    if kernel is kernels.maps_kernel:
        constants |= {"lse_n": 1, "LOG2": kernels.LOG2_E, "BLOCK_C": kernels.block_columns(columns)}
        constants |= {"HEADS": 38, "CHUNK": 5, "ALONE": True, "BLOCK_G": kernels.MOST_CONCEPTS, "head_weight": None}
    elif kernel is kernels.lse_kernel:
        constants |= {"LN2": 1 / kernels.LOG2_E, "BLOCK_S": kernels.BLOCK_S}
    else:
        constants = {"PARTS": 8, "BLOCK": kernels.BLOCK_SUM}
    types = {"query": f"*{dtype}", "key": f"*{dtype}", "index": "*i64", "scale_log2": "fp32"}
    types |= dict.fromkeys(("weight", "lse", "head_weight", "partial", "maps"), "*fp32")
    names = kernel.arg_names
    return ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types.get(name, "i32") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in ALIGNED - set(constants)},
    )


def resources(compiled) -> dict[str, int]:
    """Registers, bytes of shared memory and stack, local memory or spills, and instructions of one build."""
    report = {"shared": compiled.metadata.shared}
    if "amdgcn" in compiled.asm:
        code = compiled.asm["amdgcn"]
        field = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", code)[1])
        report["registers"] = field("vgpr_count")
        report["stack"] = field("private_segment_fixed_size")
        report["local"] = field("vgpr_spill_count") + report["stack"]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            run = lambda *command: subprocess.run([*command, file.name], capture_output=True, text=True, check=True)
            usage = run(TOOLS / "cuobjdump", "--dump-resource-usage").stdout
            code = run(TOOLS / "nvdisasm", "-c").stdout
        report["registers"] = int(re.search(r"REG:(\d+)", usage)[1])
        report["stack"] = int(re.search(r"STACK:(\d+)", usage)[1])
        report["local"] = int(re.search(r"LOCAL:(\d+)", usage)[1]) + len(re.findall(r"\b(?:LDL|STL)\b", code))
    report["matrix"] = len(re.findall(MATRIX_INSTRUCTIONS, code))
    report["vectors"] = len(re.findall(VECTORS, code))
    return report


def builds() -> Iterator[dict]:
    """Every case on every target. matrix, vectors: instructions of the matrix units, global accesses of 16 bytes."""
    for name, target in TARGETS.items():
        for kernel, dtype, width, columns in CASES:
            precision = kernels.dot_precision(SIZES[dtype], hip=target.backend == "hip")
            blocks = kernels.blocks_of(name, SIZES[dtype])
            options = {"num_warps": blocks.warps, "num_stages": blocks.stages} if width else {"num_warps": 1}
            built = source(kernel, dtype, precision, width, columns, blocks.queries)
            compiled, warps = triton.compile(built, target=target, options=options), options["num_warps"]
            case = {"kernel": kernel.fn.__name__, "target": name, "dtype": dtype, "width": width, "columns": columns}
            build = case | {"warps": warps} | resources(compiled)
            yield build | {"occupancy": occupancy(name, build["registers"], build["shared"], warps)}


class Recorder:
    """Stands for a kernel, starts nothing and keeps what each launch would compile."""

    def __init__(self, kernel, target: str = "sm_90"):
        self.binder = create_function_from_signature(kernel.signature, kernel.params, make_backend(TARGETS[target]))
        self.variants = set()

    def __getitem__(self, grid):
        return self.launch

    def launch(self, *args, **options) -> None:
        _, specialization, options = self.binder(*args, **options)
        self.variants.add(f"{specialization} {options}")


def problems(build: dict) -> list[str]:
    """What is wrong with a build."""
    found = []
    if build["local"]:
        found.append("spills or has local memory")
    if build["shared"] > PROCESSORS[build["target"]].block_shared:
        found.append("needs more shared memory than a block can have")
    if build["kernel"] != "sum_kernel" and not build["matrix"]:
        found.append("multiplies without the matrix units")
    if not build["vectors"]:
        found.append("has no global access of 16 bytes")
    if not build["occupancy"]:
        found.append("does not fit a processor")
    return found


def main() -> None:
    for build in builds():
        print(json.dumps(build), flush=True)


if __name__ == "__main__":
    sys.exit(main())
