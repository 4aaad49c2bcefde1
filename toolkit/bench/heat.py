"""Whether heat slowed the machine down: counters of the kernel (Intel) and of NVIDIA's driver.

Virtual machines and other processors tell nothing; the record then says that nothing was checked.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CPUS = Path("/sys/devices/system/cpu")
FILES = ("core_throttle_count", "package_throttle_count")
# Microseconds since the driver was loaded; drivers before 555 do not know these fields.
GPU_FIELDS = ("sw_thermal_slowdown", "hw_thermal_slowdown")
Counters = Mapping[str, int]


def cpu_counters(folder: Path = CPUS) -> dict[str, int]:
    """How often each CPU was throttled for heat, by file; empty where the kernel does not tell."""
    found = {}
    for path in sorted(folder.glob("cpu[0-9]*/thermal_throttle/*_throttle_count")):
        if path.name in FILES:
            with contextlib.suppress(OSError, ValueError):
                found[f"{path.parent.parent.name}/{path.name}"] = int(path.read_text())
    return found


def gpu_counters() -> dict[str, int]:
    """Microseconds that each GPU ran slower for heat; empty where nvidia-smi does not tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    fields = ",".join(f"clocks_event_reasons_counters.{field}" for field in GPU_FIELDS)
    done = subprocess.run(
        [program, f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = {}
    for index, line in enumerate(done.stdout.splitlines()):
        for field, value in zip(GPU_FIELDS, line.split(","), strict=False):
            with contextlib.suppress(ValueError):
                found[f"GPU {index}/{field}"] = int(value)
    return found


def evidence(before: tuple[Counters, Counters], after: tuple[Counters, Counters]) -> dict[str, Any]:
    """What happened between two readings of CPUs and GPUs, for the record.

    Returns:
        "cpu_throttles": the most that a counter grew, None where there is none;
        "gpu_throttle_s": the same in seconds; "heat_source": what told it, or that nothing did.
    """
    cpus, gpus = (_growth(old, new) for old, new in zip(before, after, strict=True))
    known = {
        "the kernel's thermal_throttle counters": cpus, "nvidia-smi's clocks_event_reasons": gpus,
    }  # fmt: skip
    told = [name for name, value in known.items() if value is not None]
    return {
        "cpu_throttles": cpus,
        "gpu_throttle_s": None if gpus is None else gpus / 1e6,
        "heat_source": " and ".join(told) or "not checked: neither kernel nor driver counts it",
    }


def _growth(before: Counters, after: Counters) -> int | None:
    """The most that one counter grew; one that is not in both readings tells nothing."""
    return max((after[name] - before[name] for name in before if name in after), default=None)
