"""What a processor of each GPU architecture holds, and how many warps of a kernel that leaves room for.

Sources: CUDA C++ Programming Guide, "Compute Capabilities"; AMD CDNA3 Instruction Set Architecture Reference Guide.
"""

from __future__ import annotations

from typing import NamedTuple


class Processor(NamedTuple):
    """registers: 32-bit ones of each of its four parts. unit: registers of a warp come in multiples of it. shared,
    block_shared: bytes of all blocks, of one. reserved: bytes that each block takes beside what it asks for."""

    warps: int
    blocks: int
    shared: int
    block_shared: int
    registers: int = 16384
    unit: int = 256
    lanes: int = 32
    reserved: int = 1024


PARTS = 4
KIB = 1 << 10
PROCESSORS = {
    "sm_80": Processor(64, 32, 164 * KIB, 163 * KIB),
    "sm_86": Processor(48, 16, 100 * KIB, 99 * KIB),
    "sm_89": Processor(48, 24, 100 * KIB, 99 * KIB),
    "sm_90": Processor(64, 32, 228 * KIB, 227 * KIB),
    "sm_100": Processor(64, 32, 228 * KIB, 227 * KIB),
    "sm_120": Processor(48, 24, 100 * KIB, 99 * KIB),
    "gfx942": Processor(32, 32, 64 * KIB, 64 * KIB, registers=32768, unit=512, lanes=64, reserved=0),
}


def resident_blocks(architecture: str, registers: int, shared: int, warps: int) -> int:
    """Blocks of `warps` warps that a processor runs at once. registers: of a thread. shared: bytes of a block."""
    processor = PROCESSORS[architecture]
    of_a_warp = -(-max(registers, 1) * processor.lanes // processor.unit) * processor.unit
    by_registers = processor.registers // of_a_warp * PARTS // warps
    by_shared = processor.shared // (shared + processor.reserved) if shared + processor.reserved else processor.blocks
    return min(processor.blocks, processor.warps // warps, by_registers, by_shared)


def occupancy(architecture: str, registers: int, shared: int, warps: int) -> float:
    """Share of the warps that a processor could hold."""
    return resident_blocks(architecture, registers, shared, warps) * warps / PROCESSORS[architecture].warps
