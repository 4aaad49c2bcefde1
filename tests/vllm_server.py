"""`gblm serve` as a process of its own, for the tests of what it answers."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from gblm.bench.server import free_port

OPTIONS = ["--enforce-eager", "--max-model-len", "256"]
Running = tuple[str, "subprocess.Popen[bytes]", Path]


@contextmanager
def served(
    folder: Path, log: Path, *words: object, options: Sequence[object] = (),
    tls: ssl.SSLContext | None = None, **environment: str,
) -> Iterator[Running]:  # fmt: skip
    """URL, process and log of `gblm serve`, once it is healthy; ended afterwards.

    Args:
        folder: the model.
        log: file for what it says.
        words: options of gblm.
        options: of vLLM, beside OPTIONS.
        tls: what a client trusts, where the options make the server speak TLS.
        environment: further variables.
    """
    port = free_port()
    command = [sys.executable, "-m", "gblm", "serve", folder, "--port", port, *words,
               "--", "--served-model-name", "tiny", *OPTIONS, *options]  # fmt: skip
    with log.open("wb") as stream:
        process = subprocess.Popen(
            list(map(str, command)), stdout=stream, stderr=stream,
            env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"} | environment,
        )  # fmt: skip
    url = f"http{'s' if tls else ''}://127.0.0.1:{port}"
    try:
        wait_for_health(url, process, tls=tls)
        assert process.poll() is None, log.read_text()
        yield url, process, log
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(120)


def wait_for_health(
    url: str, process: subprocess.Popen[bytes], seconds: float = 400,
    tls: ssl.SSLContext | None = None,
) -> None:  # fmt: skip
    """Until the server answers, ends, or the time is over."""
    limit = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < limit:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2, context=tls).close()
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
