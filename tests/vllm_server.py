"""`gblm serve` as a process of its own, for the tests of what it answers."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from gblm.bench.server import free_port

OPTIONS = ["--enforce-eager", "--max-model-len", "256"]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
Running = tuple[str, "subprocess.Popen[bytes]", Path]


@contextmanager
def served(folder: Path, log: Path) -> Iterator[Running]:
    """URL, process and log of `gblm serve`, once it is healthy; ended afterwards."""
    port = free_port()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "gblm", "serve", str(folder), "--port", str(port),
             "--name", "tiny", "--", *OPTIONS, "--chat-template", TEMPLATE],
            stdout=stream, stderr=stream, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for_health(url, process)
        assert process.poll() is None, log.read_text()
        yield url, process, log
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(120)


def wait_for_health(url: str, process: subprocess.Popen[bytes], seconds: float = 400) -> None:
    """Until the server answers, ends, or the time is over."""
    limit = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < limit:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
        except OSError:
            time.sleep(0.5)
        else:
            return


def listening(process: subprocess.Popen[bytes]) -> set[tuple[str, int]]:
    """Addresses at which a process or one of its descendants waits for connections."""
    found = set()
    try:
        parent = psutil.Process(process.pid)
        for one in (parent, *parent.children(recursive=True)):
            found |= {tuple(c.laddr) for c in one.net_connections("inet") if c.status == "LISTEN"}
    except psutil.Error:  # it has just ended
        pass
    return found
