"""Processes that a benchmark starts: their environment, memory, last words and end."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
from pathlib import Path

import psutil

logger = logging.getLogger(__name__)

STOP_SECONDS = 60


def child_environment() -> dict[str, str]:
    """Give the environment of engines and load generators.

    Imports never come from the current folder. On CPU every vLLM gets a cache of 1 GiB, unless the
    user sets another size: one that follows the free memory would differ between sides.
    """
    return {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | {"PYTHONSAFEPATH": "1"}


def memory_mb(pid: int) -> float:
    """Find the memory of a process and all below it; pages that they share count once (PSS)."""
    root = psutil.Process(pid)
    found = 0
    for process in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            memory = process.memory_full_info()
            found += getattr(memory, "pss", memory.rss)
    return found / 1e6


def last_error(log: Path, start: int) -> str:
    """Quote the last error, or else the last line, of a log from a place on."""
    text = log.read_bytes()[start:].decode("utf-8", errors="replace")
    errors = [line for line in text.splitlines() if "Error" in line]
    last = (errors or text.splitlines() or ["no output"])[-1].strip()
    return f"{last[:300]} (whole log: {log})"


def size_of(log: Path) -> int:
    """Count the bytes that a log holds so far."""
    return log.stat().st_size if log.exists() else 0


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a group: SIGTERM first; what is left of the group is killed."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        logger.warning("process %d ignored SIGTERM for %d s", process.pid, STOP_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
