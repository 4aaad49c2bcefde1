"""What Triton makes of its kernels: registers, spills, instructions of the main loops.

Needs Triton, which brings ptxas and nvdisasm, and no GPU. tests/kernels/test_triton_build.py holds
some kernels to the limits below.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import triton
from cuda_code import examine
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gblm.kernels.triton import kernels
from gblm.kernels.triton.backend import (
    ADDED,
    COMPILER,
    DENSE,
    WARPS,
    Blocks,
    Stored,
    blocks,
    sized,
)

SHAPE, UNITS = (4096, 4096), 132
CUDA, HIP = "cuda", "hip"
TARGETS = {
    "sm_80": GPUTarget(CUDA, 80, 32),
    "sm_90": GPUTarget(CUDA, 90, 32),
    "sm_120": GPUTarget(CUDA, 120, 32),
    "gfx942": GPUTarget(HIP, "gfx942", 64),
}


@dataclass(frozen=True)
class Case:
    """One kernel for weights of SHAPE, as the backend launches it; no tokens: `expand`."""

    stored: Stored
    tokens: int
    float16: bool = False

    @property
    def label(self) -> str:
        """Kernel, pattern, value type, tokens."""
        names = {16: "float", 8: "int8", 4: "int4"}
        kind = names[self.stored.kind] + (f":{self.stored.group}" if self.stored.group else "")
        pattern = "2:4" if self.stored.two_four else "any"
        what = (
            f"multiply, {self.tokens} token{'s' * (self.tokens > 1)}" if self.tokens else "expand"
        )
        return f"{what}, {pattern} {kind}" + (", float16" if self.float16 else "")

    @property
    def blocks(self) -> Blocks:
        """Of the launch."""
        if self.tokens:
            return blocks(self.stored, SHAPE, self.tokens, UNITS)
        return Blocks(*sized(DENSE, self.stored), 0, 1)


@dataclass(frozen=True)
class Limits:
    """`instructions`: of all threads, per weight of the dense shape, in the main loop."""

    registers: int
    instructions: float


@dataclass(frozen=True)
class Found:
    """What a compiler made; `instructions` as in Limits, 0 where there is no loop."""

    registers: int
    spilled_bytes: int
    instructions: float
    image_bytes: int


def case(two_four: bool, kind: int, group: int, tokens: int, float16: bool = False) -> Case:
    """See Case and Stored."""
    return Case(Stored(two_four, kind, group), tokens, float16)


# What the tests compile, and its limits: those of the worst target, and some room.
LIMITS = {
    case(True, 16, 0, 1): Limits(80, 8.4),
    case(True, 16, 0, 16): Limits(88, 9.6),
    case(False, 16, 0, 1): Limits(64, 16.8),
    case(False, 4, 32, 16): Limits(120, 31.0),
    case(True, 4, 128, 1): Limits(72, 9.4),
    case(False, 16, 0, 0): Limits(40, 0),
}


def compile_case(one: Case, target: GPUTarget) -> Any:
    """Triton's compiled kernel, as the JIT would make it for aligned arrays."""
    fn = kernels.multiply if one.tokens else kernels.expand
    floats = kernels.tl.float16 if one.float16 else kernels.tl.bfloat16
    constants = one.stored.options(SHAPE, one.blocks.rows, one.blocks.columns) | {"FLOAT": floats}
    if one.tokens:
        constants |= {"TOKENS": one.blocks.tokens, "SPLIT": one.blocks.split}
    return compile_kernel(fn, _types(one), constants, target)


def compile_kernel(
    fn: Any, types: dict[str, str], constants: dict[str, Any], target: GPUTarget
) -> Any:
    """As the JIT would for arrays and numbers that 16 divides, but `tokens` and `size`."""
    names, any_number = fn.arg_names, ("tokens", "size", *constants)
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=fn,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names) if name not in any_number
        },
    )  # fmt: skip
    return triton.compile(source, target=target, options=COMPILER)


def compile_shares(target: GPUTarget) -> Any:
    """The kernel that adds the shares of columns."""
    types = {"shares": "*fp32", "out": "*bf16", "size": "i32"}
    return compile_kernel(kernels.add_shares, types, {"SPLIT": 8, "BLOCK": ADDED}, target)


def _types(one: Case) -> dict[str, str]:
    number = "*fp16" if one.float16 else "*bf16"
    values = {8: "*i16", 16: "*i32"} if one.stored.two_four else {8: "*i8", 16: number}
    return {
        "x": "*i64", "values": values.get(one.stored.kind, "*u8"), "words": "*i32",
        "starts": "*i16", "begins": "*i64", "scales": "*bf16",
        "out": number if one.blocks.split == 1 else "*fp32",
        "tokens": "i32", "rows": "i32", "columns": "i32",
    }  # fmt: skip


def found(one: Case, target: GPUTarget) -> Found:
    """Compile and count."""
    compiled = compile_case(one, target)
    threads = WARPS * target.warp_size
    weights = one.blocks.rows * one.blocks.columns
    if target.backend == CUDA:
        image = compiled.asm["cubin"]
        (kernel,) = examine(image).values()
        loop, registers, spilled = kernel.loop, kernel.registers, kernel.spilled_bytes
    else:
        image, text = compiled.asm["hsaco"], compiled.asm["amdgcn"]
        loop, registers = amd_loop(text), _field(text, "vgpr_count")
        spilled = _field(text, "private_segment_fixed_size")
    per_weight = loop * threads / weights if one.tokens else 0.0
    return Found(registers, spilled, round(per_weight, 2), len(image))


def amd_loop(text: str) -> int:
    """Instructions of the longest body of a backward branch."""
    labels: dict[str, int] = {}
    count = longest = 0
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = count
        elif op := re.match(r"\t([a-z]\w+)\s*(\S*)", line):
            count += 1
            if op[1].startswith(("s_cbranch", "s_branch")) and op[2] in labels:
                longest = max(longest, count - labels[op[2]])
    return longest


def _field(text: str, name: str) -> int:
    (number,) = re.findall(rf"\.{name}:\s*(\d+)", text)
    return int(number)
