"""Triton's kernels, compiled ahead of time as the backend launches them.

Needs Triton, which brings ptxas and nvdisasm, and no GPU.
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

    @property
    def label(self) -> str:
        """Kernel, pattern, value type, tokens."""
        names = {16: "float", 8: "int8", 4: "int4"}
        kind = names[self.stored.kind] + (f":{self.stored.group}" if self.stored.group else "")
        pattern = "2:4" if self.stored.two_four else "any"
        what = (
            f"multiply, {self.tokens} token{'s' * (self.tokens > 1)}" if self.tokens else "expand"
        )
        return f"{what}, {pattern} {kind}"

    @property
    def blocks(self) -> Blocks:
        """Of the launch."""
        if self.tokens:
            return blocks(self.stored, SHAPE, self.tokens, UNITS)
        return Blocks(*sized(DENSE, self.stored), 0, 1)


def case(two_four: bool, kind: int, group: int, tokens: int) -> Case:
    """See Case and Stored."""
    return Case(Stored(two_four, kind, group), tokens)


# What the tests compile.
CASES = (
    case(True, 16, 0, 1),
    case(True, 16, 0, 16),
    case(False, 16, 0, 1),
    case(False, 4, 32, 16),
    case(True, 4, 128, 1),
    case(False, 16, 0, 0),
)


def compile_case(one: Case, target: GPUTarget) -> Any:
    """Triton's compiled kernel, as the JIT would make it for aligned arrays."""
    fn = kernels.multiply if one.tokens else kernels.expand
    constants = one.stored.options(SHAPE, one.blocks.rows, one.blocks.columns) | {
        "FLOAT": kernels.tl.bfloat16
    }
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
    values = {8: "*i16", 16: "*i32"} if one.stored.two_four else {8: "*i8", 16: "*bf16"}
    return {
        "x": "*i64", "values": values.get(one.stored.kind, "*u8"), "words": "*i32",
        "starts": "*i16", "begins": "*i64", "scales": "*bf16",
        "out": "*bf16" if one.blocks.split == 1 else "*fp32",
        "tokens": "i32", "rows": "i32", "columns": "i32",
    }  # fmt: skip


def spilled_bytes(one: Case, target: GPUTarget) -> int:
    """Compile, and count what does not fit into registers."""
    compiled = compile_case(one, target)
    if target.backend == CUDA:
        (kernel,) = examine(compiled.asm["cubin"]).values()
        return kernel.spilled_bytes
    (number,) = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", compiled.asm["amdgcn"])
    return int(number)
