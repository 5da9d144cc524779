"""Compiles the Triton kernels for GPUs that are not here and prints, as JSON lines, what each build needs.

Runs in a process of its own (`python tools/gpu/triton_offline.py`): Triton fixes at import whether it interprets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from occupancy import PROCESSORS, occupancy
from star_kernels.triton import allocate, attention_maps, gaussian_step, nft_loss, policy_loss
from star_kernels.triton.device import starts_early

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_INSTRUCTIONS = r"\bHMMA\.|\bHGMMA\.|\bUTC\w*MMA|v_mfma"
VECTORS = r"\b(?:LDG|LDGSTS|STG)(?:\.\w+)*\.128|(?:global|buffer)_(?:load|store)_dwordx4"
CONTRACTED = r"\b[FD]FMA\d?\b|v_(?:pk_)?(?:fma|fmac|mad|mac)_f(?:16|32|64)"
SIZES = {"bf16": 2, "fp32": 4}  # bytes of an element
# Whose alignment a launch sees, beside that of every pointer.
ALIGNED = {"query_b", "query_h", "query_n", "key_b", "key_h", "key_s", "lse_b", "lse_h", "elements", "maps_b", "maps_g"}
ALIGNED |= {"channels", "locations", "stride_b", "stride_c", "stride_p"}


class Case(NamedTuple):
    """What a launch on contiguous tensors at a model's shapes compiles.

    about: what it is a case of. types: of the elements that pointers point to, and of numbers that are not int32.
    constants: arguments that are compiled in, strides of 1 too. products: by the matrix units. wide: accesses memory by
    16 bytes. exact: nothing in it may be contracted.
    """

    kernel: object
    about: str
    types: dict[str, str]
    constants: dict
    options: dict
    products: bool = False
    wide: bool = True
    exact: bool = False

    def source(self) -> ASTSource:
        names, constants = self.kernel.arg_names, self.constants
        types = {name: self.types.get(name, "i32") for name in names} | dict.fromkeys(constants, "constexpr")
        aligned = [i for i, name in enumerate(names) if types[name][0] == "*" or name in ALIGNED - set(constants)]
        return ASTSource(
            fn=self.kernel,
            signature=types,
            constexprs={(names.index(name),): value for name, value in constants.items()},
            attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
        )


def of_maps(target: str, kernel, dtype: str, width: int, columns: int = 0) -> Case:
    """columns: of all concepts, for the maps; without them the log-sum-exp."""
    code, size = attention_maps, SIZES[dtype]
    precision, blocks = code.dot_precision(size, hip=target.startswith("gfx")), code.blocks_of(target, size)
    constants = {"query_d": 1, "key_d": 1, "D": width, "PRECISION": precision, "BLOCK_N": blocks.queries}
    constants |= {"BLOCK_D": code.block_width(width, size, precision), "SHARED": 1, "bias": None}
    if columns:
        constants |= {"lse_n": 1, "LOG2": code.LOG2_E, "BLOCK_C": code.block_columns(columns), "head_weight": None}
        constants |= {"HEADS": 38, "CHUNK": 5, "ALONE": True, "BLOCK_G": code.MOST_CONCEPTS, "EARLY": False}
    else:
        constants |= {"LN2": 1 / code.LOG2_E, "BLOCK_S": code.BLOCK_S}
    types = {"query": f"*{dtype}", "key": f"*{dtype}", "index": "*i64", "scale_log2": "fp32"}
    types |= dict.fromkeys(("weight", "lse", "maps"), "*fp32")
    options = {"num_warps": blocks.warps, "num_stages": blocks.stages}
    about = f"{dtype}, {width} channels" + (f", {columns} columns" if columns else "")
    return Case(kernel, about, types, constants, options, products=True)


def started(early: bool) -> dict:
    """Options of a launch that starts before the one in front of it has ended."""
    return {"launch_pdl": True} if early else {}


def cases(target: str) -> Iterator[Case]:
    """What SD3 (64 channels) and FLUX (128) launch."""
    for dtype, width, columns in (("bf16", 64, 16), ("bf16", 128, 16), ("bf16", 128, 64), ("fp32", 64, 16),
                                  ("fp32", 128, 64)):  # fmt: skip
        yield of_maps(target, attention_maps.maps_kernel, dtype, width, columns)
    for dtype, width in (("bf16", 64), ("bf16", 128), ("fp32", 128)):
        yield of_maps(target, attention_maps.lse_kernel, dtype, width)
    early = starts_early(target)
    parts = {"PARTS": attention_maps.CHUNKS, "BLOCK": attention_maps.BLOCK_SUM, "EARLY": early}
    types = {"partial": "*fp32", "maps": "*fp32"}
    yield Case(attention_maps.sum_kernel, f"{parts['PARTS']} parts", types, parts, {"num_warps": 1} | started(early))

    types = dict.fromkeys(("sample", "noise", "a", "b", "s", "prev_sample", "mean"), "*fp32")
    constants = {"BLOCK": gaussian_step.BLOCK, "stride_a": 1, "stride_b": 1, "stride_s": 1}
    options = {"num_warps": gaussian_step.WARPS, "enable_fp_fusion": False}
    types |= {"seeds": "*i64", "guidance_scale": "fp64"}
    for dtype in ("bf16", "fp32"):
        about = f"{dtype} velocity, fp32 latents"
        types = types | dict.fromkeys(("velocity", "unconditional_velocity"), f"*{dtype}")
        absent = {"unconditional_velocity": None, "seeds": None}
        yield Case(gaussian_step.step_kernel, about, types, constants | absent, options, exact=True)
        yield Case(
            gaussian_step.step_kernel, f"{about}, guided", types, constants | {"seeds": None}, options, exact=True
        )
        # A square root that is rounded right is made of fused multiply-adds.
        about = f"{about}, guided, noise drawn"
        yield Case(gaussian_step.step_kernel, about, types, constants | {"noise": None}, options)

    block = allocate.MOST_TOKENS
    constants = {"maps_n": 1, "LARGEST": False, "BLOCK": block}
    types = dict.fromkeys(("maps", "workspace", "weights"), "*fp32")
    types |= dict.fromkeys(("sigma", "sharpen", "cap", "mix"), "fp64")
    options = {"num_warps": block // allocate.TOKENS_OF_WARP}
    for used in (False, True):
        about = "smoothed and sharpened" if used else "neither smoothed nor sharpened"
        chosen = constants | {"SMOOTH": used, "SHARPEN": used}
        yield Case(allocate.allocate_kernel, about, types, chosen, options, wide=False)

    for shape, dtype, ratio, guard in (
        ((9, 16, 128, 128), "fp32", "token", False),
        ((9, 16, 128, 128), "bf16", "token", False),
        ((9, 16, 128, 128), "bf16", "location", True),
        ((9, 4096, 64), "bf16", "token", False),
    ):
        yield from of_loss(shape, dtype, ratio, guard, early)
    for shape, dtype, each in (
        ((9, 16, 128, 128), "fp32", False),
        ((9, 16, 128, 128), "bf16", True),
        ((9, 4096, 64), "bf16", False),
    ):
        yield from of_nft_loss(shape, dtype, each)


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
    report["contracted"] = len(re.findall(CONTRACTED, code))
    return report


def of_loss(shape: tuple[int, ...], dtype: str, ratio: str, guard: bool, early: bool) -> Iterator[Case]:
    """Of latents in float32 with weights and a velocity in dtype. guard: with a reference velocity and an advantage for
    each location too."""
    one, code = policy_loss.cut(shape), policy_loss
    about = f"{'packed' if len(shape) == 3 else 'planar'}, {dtype} velocity, {ratio}{', guard, KL' if guard else ''}"
    others = ("sample", "prev_sample", "old_mean", "a", "b", "s", "precision", "log_norm", "kl_precision", "advantages")
    others += ("step_weights", "weights", "old_log_prob", "log_ratios", "loss", "statistics", "grad_loss")
    types = dict.fromkeys(("velocity", "reference_velocity", "gradient"), f"*{dtype}")
    types |= dict.fromkeys(others, "*fp32") | {"sums": "*fp64"}
    types |= dict.fromkeys(("clip_low", "clip_high", "adv_clip", "kl_coef", "per_channel", "per_element"), "fp64")
    options = {"num_warps": code.WARPS, "enable_fp_fusion": False}
    fixed = {"fields": 1, "RATIO": ratio}
    tiled = fixed | {"GUARD": guard, "EACH_ADVANTAGE": guard, "BLOCK_C": one.block_c, "BLOCK_P": one.block_p}
    tiled |= {"stride_c" if len(shape) == 3 else "stride_p": 1, "step_weights": None}
    tiled |= {} if guard else {"reference_velocity": None}
    sums = {"EACH_OLD": False, "SUMS": code.SUMS, "old_log_prob": None, "EARLY": early}
    # The other cases divide or exponentiate by sequences of fused multiply-adds.
    exact = ratio == "token" and not guard
    yield Case(code.ratios_kernel, about, types, tiled | sums, options, exact=exact)
    tiled |= {} if guard else {"old_mean": None}
    options = options | {"num_warps": code.GRADIENT_WARPS}
    yield Case(code.gradient_kernel, about, types, tiled, options, exact=exact)
    added = {"KL_TERM": guard, "SUMS": code.SUMS, "BLOCK_B": code.BLOCK_B, "BLOCK_T": code.BLOCK_T}
    added["EARLY"] = early
    options = options | {"num_warps": code.STATISTICS_WARPS} | started(early)
    yield Case(code.statistics_kernel, about, types, fixed | added, options, wide=False)


def of_nft_loss(shape: tuple[int, ...], dtype: str, each: bool) -> Iterator[Case]:
    """Of latents in float32 with weights and velocities in dtype. each: a reward for each location, and a KL term."""
    one, code = policy_loss.cut(shape), nft_loss
    layout = "packed" if len(shape) == 3 else "planar"
    about = f"nft, {layout}, {dtype} velocity{', rewards of locations, KL' if each else ''}"
    types = dict.fromkeys(("velocity", "old_velocity", "reference_velocity", "gradient"), f"*{dtype}")
    others = ("sample", "clean", "sigma", "reward_prob", "weights", "errors", "loss", "statistics", "grad_loss")
    types |= dict.fromkeys(others, "*fp32") | {"sums": "*fp64"}
    types |= dict.fromkeys(("beta", "adaptive_min", "loss_scale", "kl_coef", "share", "pull"), "fp64")
    tiled = {"EACH_REWARD": each, "BLOCK_C": one.block_c, "BLOCK_P": one.block_p}
    tiled |= {"stride_c" if len(shape) == 3 else "stride_p": 1} | ({} if each else {"reference_velocity": None})
    options = {"num_warps": code.WARPS, "enable_fp_fusion": False}
    yield Case(code.sums_kernel, about, types, tiled | {"SUMS": code.SUMS}, options)
    yield Case(code.gradient_kernel, about, types, tiled | {"ADAPTIVE": True}, options)
    added = {"ADAPTIVE": True, "KL_TERM": each, "SUMS": code.SUMS, "BLOCK_B": code.BLOCK_B, "BLOCK_T": code.BLOCK_T}
    yield Case(code.statistics_kernel, about, types, added, options, wide=False)


def builds(targets: Iterable[str] = TARGETS) -> Iterator[dict]:
    """Every case on some of the TARGETS. matrix, vectors, contracted: instructions of the matrix units, global accesses
    of 16 bytes, fused multiply-adds."""
    for name in targets:
        for case in cases(name):
            compiled, warps = triton.compile(case.source(), TARGETS[name], case.options), case.options["num_warps"]
            build = {"kernel": case.kernel.fn.__name__, "about": case.about, "target": name, "warps": warps}
            build |= {"products": case.products, "wide": case.wide, "exact": case.exact} | resources(compiled)
            yield build | {"occupancy": occupancy(name, build["registers"], build["shared"], warps)}


class Driver:
    """Stands for a GPU's: launches compile what they would there, and start nothing."""

    class utils:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": PROCESSORS["sm_90"].block_shared})
        load_binary = staticmethod(lambda name, kernel, shared, device: (name, 0, 0, 0, 1024))

    launcher_cls = staticmethod(lambda source, metadata: lambda *arguments: None)
    get_current_target = staticmethod(lambda: TARGETS["sm_90"])
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)


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
    if build["products"] and not build["matrix"]:
        found.append("multiplies without the matrix units")
    if build["wide"] and not build["vectors"]:
        found.append("has no global access of 16 bytes")
    if build["exact"] and build["contracted"]:
        found.append("contracts products and sums")
    if not build["occupancy"]:
        found.append("does not fit a processor")
    return found


def main() -> None:
    for build in builds():
        print(json.dumps(build), flush=True)


if __name__ == "__main__":
    sys.exit(main())
