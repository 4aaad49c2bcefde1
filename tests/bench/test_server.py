"""What is measured of a server's processes, on a process that is no server."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gblm.bench.server import RunningServer, given_back

# Holds 96 MiB in a child for a moment, then nothing of it.
HOLD = """
import os, sys
block = b"x" * (96 << 20)
del block
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def running(code: str) -> Iterator[RunningServer]:
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        yield RunningServer("http://127.0.0.1:1", 0.0, process, Path(), 0)
        process.communicate()


def test_the_peak_counts_what_wasgiven_back_before_the_reading() -> None:
    with running(HOLD) as server:
        now, given_back = server.memory_bytes(), server.given_back_bytes()
    assert now < 64 << 20
    assert 90 << 20 < given_back < 112 << 20


def test_a_process_that_has_ended_holds_nothing() -> None:
    assert given_back(2**22 + 1) == 0
