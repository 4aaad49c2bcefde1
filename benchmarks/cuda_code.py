"""What the compiler makes of the CUDA kernels: registers, spills, instructions of the main loops.

Needs NVRTC and nvdisasm, which Triton brings; no GPU. tests/kernels/test_cuda_build.py holds
every kernel to the limits below; run as a script, this writes the record of docs/gpu.md.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pages import made_by

from gblm.errors import MachineError
from gblm.kernels.cuda import nvrtc
from gblm.kernels.cuda.source import Variant
from gblm.provenance import provenance

ARCHS = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
KEPT_PER_WORD = 8
PRODUCTS = "HMMA.SP"
RECORD = Path(__file__).parent / "results" / "cuda-code.json"
PAGE = Path(__file__).parent.parent / "docs" / "gpu.md"
BEGIN, END = "<!-- cuda-code: begin -->", "<!-- cuda-code: end -->"
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
    """A variant as `sparse_tensor_core.variant` makes them."""
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
    mma_sp(14, 128, 1): Limits(64, 5.4),
    mma_sp(28, 128, 1): Limits(56, 5.5),
    mma_sp(28, 128, 1, bf16=0): Limits(56, 5.0),
    mma_sp(28, 128, 8): Limits(136, 6.2),
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


def _record() -> dict[str, Any]:
    """Every variant on every architecture."""
    rows = []
    for variant in VARIANTS:
        for arch in ARCHS:
            image = nvrtc.compile_text(variant.text(), variant.options, arch, variant.label)
            found = examine(image)[variant.file]
            rows.append({
                "variant": variant.label, "arch": f"sm_{arch[0]}{arch[1]}", **asdict(found),
                "instructions": round(found.instructions(variant), 2), "cubin_bytes": len(image),
            })  # fmt: skip
    return {
        "kind": "cuda code",
        "command": made_by(),
        "provenance": provenance(),
        "nvrtc": ".".join(map(str, nvrtc.version())),
        "rows": rows,
    }


def _table(record: dict[str, Any]) -> str:
    """Registers and instructions by variant, smallest and largest of the architectures."""
    lines = [
        "| variant | registers | spilled bytes | instructions per kept weight |",
        "|" + " --- |" * 4,
    ]
    for variant in dict.fromkeys(row["variant"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["variant"] == variant]
        spans = [
            sorted({row[key] for row in rows})
            for key in ("registers", "spilled_bytes", "instructions")
        ]
        cells = (f"{s[0]}–{s[-1]}" if s[0] != s[-1] else f"{s[0]}" for s in spans)
        lines.append(f"| `{variant}` | {' | '.join(cells)} |")
    archs = ", ".join(dict.fromkeys(row["arch"] for row in record["rows"]))
    return "\n".join([*lines, "", f"NVRTC {record['nvrtc']}; smallest and largest of {archs}."])


def main() -> None:
    """Write the record and its table."""
    record = _record()
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    PAGE.write_text(f"{head}{BEGIN}\n{_table(record)}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
