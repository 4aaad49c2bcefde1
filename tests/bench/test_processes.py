"""Processes of benchmarks: their memory and last words, on processes that are no servers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gblm.bench.processes import (
    child_environment,
    given_back,
    last_error,
    memory_metrics,
    run_child,
    size_of,
)
from gblm.errors import MachineError

# Holds 96 MiB in a child for a moment, then nothing of it.
HOLD = """
import os, sys
block = b"x" * (96 << 20)
del block
print("held", flush=True)
sys.stdin.read()
"""


def test_the_peak_counts_what_was_given_back_before_the_reading() -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        found = memory_metrics(process.pid)
        process.communicate()
    assert found["memory_mb"] < 64
    assert 90 < found["peak_memory_mb"] - found["memory_mb"] < 118


def test_a_process_that_has_ended_holds_nothing() -> None:
    assert given_back(2**22 + 1) == 0


def test_the_last_error_of_this_run_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("OldError: before\n")
    start = size_of(log)
    log.write_text(log.read_text() + "ValueError: no room\nbye\n")
    assert last_error(log, start) == f"ValueError: no room (whole log: {log})"
    assert last_error(log, size_of(log)).startswith("no output")


def test_a_failed_program_ends_in_its_last_words() -> None:
    command = [sys.executable, "-c", "import sys; sys.exit('no such thing')"]
    with pytest.raises(MachineError, match="the tool ended with code 1: no such thing"):
        run_child(command, "the tool", 60, child_environment())
    command = [sys.executable, "-c", "import time; time.sleep(9)"]
    with pytest.raises(MachineError, match=r"the tool was not done after 0\.1 s"):
        run_child(command, "the tool", 0.1, child_environment())
