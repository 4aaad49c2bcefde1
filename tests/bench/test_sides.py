"""Processes of benchmarks: their memory and last words, on processes that are no servers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gblm.bench import server
from gblm.bench.sides import child_environment, last_error, memory_mb, size_of
from gblm.errors import MachineError


def test_memory_is_that_of_a_tree_of_processes() -> None:
    hold = "block = b'x' * (96 << 20); print('held', flush=True); input()"
    before = memory_mb(os.getpid())
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        assert process.stdout is not None
        process.stdout.readline()
        assert memory_mb(process.pid) > 96
        assert memory_mb(os.getpid()) - before > 96
        process.communicate(b"\n")


def test_caches_have_one_size_unless_the_user_sets_another(monkeypatch: pytest.MonkeyPatch) -> None:
    space = "VLLM_CPU_KVCACHE_SPACE"
    monkeypatch.delenv(space, raising=False)
    assert child_environment(("--dtype", "bfloat16"))[space] == "1"
    for words in (("--kv-cache-memory-bytes", "256M"), ("--kv-cache-memory-bytes=256M",)):
        assert space not in child_environment(words)
    monkeypatch.setenv(space, "7")
    assert child_environment()[space] == "7"


def test_the_last_error_of_this_run_is_quoted(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text("OldError: before\n")
    start = size_of(log)
    log.write_text(log.read_text() + "ValueError: no room\nbye\n")
    assert last_error(log, start) == f"ValueError: no room (whole log: {log})"
    assert last_error(log, size_of(log)).startswith("no output")


@pytest.mark.parametrize(
    ("program", "sentence"),
    [("import sys; sys.exit('no such thing')", "ended with code 1: no such thing"),
     ("import time; time.sleep(9)", "was not done after"),
     ("pass", "ended with code 0: no message")],
)  # fmt: skip
def test_a_failed_load_generator_ends_in_its_last_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, sentence: str
) -> None:
    fake = tmp_path / "python"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{program}"\n')
    fake.chmod(0o755)
    monkeypatch.setattr(server.sys, "executable", str(fake))
    monkeypatch.setattr(server, "LOAD_SECONDS", 2)
    with pytest.raises(MachineError, match=f"vllm bench serve {sentence}"):
        server.run_vllm_bench([], tmp_path / "result.json")
