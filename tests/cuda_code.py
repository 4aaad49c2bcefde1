"""What the compiler makes of the CUDA kernels: registers, spills, instructions of the main loops.

Needs NVRTC and nvdisasm, which Triton brings; no GPU. tests/kernels/test_cuda_build.py holds every
kernel to the limits below.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from gblm.errors import MachineError
from gblm.kernels.cuda.nvrtc import Variant

ARCHS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
KEPT_PER_WORD = 8
PRODUCTS = "HMMA.SP"
WARP = 32


@dataclass(frozen=True)
class Limits:
    """`instructions`: per kept weight and thread of a warp, in the main loop."""

    registers: int
    instructions: float


@dataclass(frozen=True)
class Found:
    """One kernel of a cubin; the loop is the longest body of a backward branch."""

    registers: int
    spilled_bytes: int
    loop: int
    vector_loads: int
    sparse_products: int

    def instructions(self, variant: Variant) -> float:
        """Per kept weight, of the main loop."""
        defines = dict(variant.defines)
        if variant.file == "delta":
            # Every word loads its eight values at once.
            return self.loop / (self.vector_loads * KEPT_PER_WORD)
        # A product takes 16 × 16 kept weights, for each block of tokens anew.
        return self.loop * WARP / (self.sparse_products / defines["TOKENS"] * 256)


def mma_sp(values: int, group: int, tokens: int, bf16: int = 1, tail: int = 0) -> Variant:
    """A variant as `gblm.kernels.cuda.mma_sp.variant` makes them."""
    defines = {
        "BF16": bf16, "TOKENS": tokens, "VALUES": values, "GROUP": group, "TAIL": tail,
        "REPACKED": int(tokens > 2),
    }  # fmt: skip
    return Variant("mma_sp", tuple(defines.items()))


def delta(tokens: int, bf16: int = 1) -> Variant:
    """A variant as the backend `delta` makes them."""
    return Variant("delta", (("BF16", bf16), ("TOKENS", tokens)))


VARIANTS = {
    mma_sp(16, 0, 1): Limits(40, 2.5),
    mma_sp(16, 0, 1, bf16=0): Limits(40, 2.5),
    mma_sp(16, 0, 1, tail=1): Limits(48, 3.9),
    mma_sp(16, 0, 2): Limits(48, 4.5),
    mma_sp(16, 0, 4): Limits(56, 1.6),
    mma_sp(16, 0, 8): Limits(80, 2.6),
    mma_sp(8, 0, 1): Limits(48, 5.3),
    mma_sp(8, 128, 1): Limits(56, 5.9),
    mma_sp(8, 128, 1, bf16=0): Limits(56, 5.9),
    mma_sp(8, 128, 8): Limits(136, 6.7),
    mma_sp(4, 128, 1): Limits(64, 5.2),
    mma_sp(4, 32, 2): Limits(64, 8.0),
    delta(1): Limits(40, 10.8),
    delta(1, bf16=0): Limits(40, 10.8),
    delta(4): Limits(48, 19.7),
    delta(8): Limits(64, 31.0),
}


@cache
def disassembler() -> Path | None:
    """nvdisasm, with cuobjdump beside it; Triton's wheel has both."""
    spec = importlib.util.find_spec("triton")
    for root in (spec.submodule_search_locations or []) if spec else []:
        found = Path(root) / "backends" / "nvidia" / "bin" / "nvdisasm"
        if found.exists():
            return found
    return None


def examine(image: bytes) -> dict[str, Found]:
    """Every kernel of a cubin, by its name."""
    tool = disassembler()
    if tool is None:
        raise MachineError("no nvdisasm: pip install triton.")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        usage = _run(tool.with_name("cuobjdump"), "-res-usage", file.name)
        listing = _run(tool, "-c", file.name)
    pattern = r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)"
    sizes = {name: numbers for name, *numbers in re.findall(pattern, usage)}
    sections = re.split(r"\.section\s+\.text\.(\w+)", listing)[1:]
    codes = dict(zip(sections[::2], sections[1::2], strict=True))
    return {name: _found(codes[name], *map(int, numbers)) for name, numbers in sizes.items()}


def _found(code: str, registers: int, stack: int, local: int) -> Found:
    body = _main_loop(code)
    products = [op for op in body if op.startswith(PRODUCTS)]
    loads = [op for op in body if op.startswith("LDG") and ".128" in op]
    return Found(registers, stack + local, len(body), len(loads), len(products))


def _main_loop(code: str) -> list[str]:
    """The opcodes of a backward branch's body: that with the most products, then the longest."""
    labels: dict[str, int] = {}
    ops: list[str] = []
    longest: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(ops)
            continue
        found = re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*)", line)
        if not found:
            continue
        ops.append(found[1])
        target = re.search(r"`\((\.L_x_\d+)\)", found[2])
        if found[1].startswith("BRA") and target and target[1] in labels:
            body = ops[labels[target[1]] :]
            longest = max(longest, body, key=_weight)
    return longest


def _weight(body: list[str]) -> tuple[int, int]:
    return sum(op.startswith(PRODUCTS) for op in body), len(body)


def _run(tool: Path, *arguments: str) -> str:
    return subprocess.run([tool, *arguments], check=True, capture_output=True, text=True).stdout
