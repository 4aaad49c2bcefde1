"""NVIDIA's compute-sanitizer over the small cases, in processes of their own, where it is there.

`python -m gblm.gpu_check.sanitizer` is what runs inside: every access of every kernel is checked.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gblm.errors import MachineError
from gblm.gpu_check.correctness import Cases, check_products
from gblm.gpu_check.place import Cuda, Place
from gblm.gpu_check.section import Section

PROGRAM = "compute-sanitizer"
TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND_ERRORS = 86
INNER_SECONDS = 3600
SMALL = Cases(
    specs=("nm/2:4", "nm/2:4/int8:128", "nm/2:4/int4:32", "bitmask/0.5"),
    shapes=((40, 384),),
    tokens=(1, 17, 70),
    in_graphs=(),
)


def run_sanitizer(section: Section, tools: Sequence[str] = TOOLS) -> None:
    """A row per tool: {"tool", "clean", "code", "summary"}."""
    program = find_program()
    if program is None:
        section.skip("all tools", f"{PROGRAM} was not found; it comes with the CUDA toolkit")
        return
    for tool in tools:
        section.attempt(tool, lambda tool=tool: _run(section, program, tool))  # type: ignore[misc]


def find_program() -> str | None:
    """Where compute-sanitizer is: in the path, or in the CUDA toolkit."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(PROGRAM) or shutil.which(str(Path(home) / "bin" / PROGRAM))


def _run(section: Section, program: str, tool: str) -> None:
    command = [
        program, "--tool", tool, "--error-exitcode", str(FOUND_ERRORS),
        sys.executable, "-m", __name__,
    ]  # fmt: skip
    # With PyTorch's cache, small tensors share an allocation, and nothing is out of its bounds.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=env,
            timeout=section.seconds_left,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        section.skip(tool, "did not end in time")
        return
    summaries = re.findall(r"=+ +(.*SUMMARY.*)", done.stdout + done.stderr)
    if done.returncode not in (0, FOUND_ERRORS):
        last = ((done.stderr.strip() or done.stdout.strip()).splitlines() or ["no message"])[-1]
        raise MachineError(f"ended with code {done.returncode}: {last}")
    section.rows.append(
        {
            "tool": tool,
            "clean": done.returncode == 0,
            "code": done.returncode,
            "summary": summaries[-1] if summaries else "",
        }
    )


def small_cases(place: Place) -> int:
    """Multiply; 0 if all results are right, else 1, and the reasons are printed."""
    section = Section("small", time.perf_counter() + INNER_SECONDS)
    check_products(place, section, SMALL)
    wrong = [row for row in section.rows if not row["error"] < 1e-2]
    for text in (*section.failed, *map(str, wrong)):
        print(text, file=sys.stderr)
    return int(bool(wrong or section.failed or not section.rows))


if __name__ == "__main__":
    sys.exit(small_cases(Cuda()))
