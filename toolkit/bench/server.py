"""One server as a subprocess: started by `gblm serve`, awaited, measured, stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from gblm.errors import MachineError

logger = logging.getLogger(__name__)

START_SECONDS = 900
STOP_SECONDS = 60


@dataclass
class RunningServer:
    """A server that answers /health.

    Attributes:
        url: base URL.
        ready_seconds: from start to the first healthy answer.
        process: the server's parent process.
        log: file with its output.
        log_start: where its output begins in that file.
    """

    url: str
    ready_seconds: float
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int

    def backends(self) -> set[str]:
        """The backends that the plugin's log line says it runs on; empty for a dense model."""
        with self.log.open("rb") as stream:
            stream.seek(self.log_start)
            text = stream.read().decode("utf-8", errors="replace")
        return set(re.findall(r"gblm: \d+ linears run on backend (\w+)", text))

    def memory_bytes(self) -> int:
        """Memory of the whole process tree; shared pages are counted once (PSS)."""
        total = 0
        root = psutil.Process(self.process.pid)
        for process in (root, *root.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                memory = process.memory_full_info()
                total += getattr(memory, "pss", memory.rss)
        return total

    def given_back_bytes(self) -> int:
        """What the processes that live now held at their peaks more than now, loading included.

        The peaks need not have been at one time: memory now and this are an upper bound together.
        """
        root = psutil.Process(self.process.pid)
        return sum(given_back(one.pid) for one in (root, *root.children(recursive=True)))


def given_back(pid: int) -> int:
    """Bytes that a process held at its peak more than now; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    kilobytes = dict(re.findall(r"^(VmHWM|VmRSS):\s+(\d+) kB$", status, re.MULTILINE))
    return 1024 * (int(kilobytes.get("VmHWM", 0)) - int(kilobytes.get("VmRSS", 0)))


@contextmanager
def running_server(
    folder: Path,
    backend: str | None,
    options: tuple[str, ...],
    log: Path,
    shutdown_timeout: int = 5,
) -> Iterator[RunningServer]:
    """Start a server on a free port of 127.0.0.1 and stop it at the end.

    Args:
        folder: the model.
        backend: for packed weights; the best one if None.
        options: for vLLM.
        log: file that receives the server's output.
        shutdown_timeout: seconds that running requests get after SIGTERM.

    Raises:
        MachineError: the server ended, or was not healthy in time; the log's end is quoted.
    """
    port = free_port()
    command = [sys.executable, "-m", "gblm", "serve", str(folder), "--port", str(port),
               "--name", "model", "--shutdown-timeout", str(shutdown_timeout)]  # fmt: skip
    if backend is not None:
        command += ["--backend", backend]
    began = time.monotonic()
    log_start = log.stat().st_size if log.exists() else 0
    with log.open("ab") as stream:
        process = subprocess.Popen(
            [*command, "--", *options],
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env=child_environment(),
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await_health(process, url, log, log_start)
        yield RunningServer(url, time.monotonic() - began, process, log, log_start)
    finally:
        _stop(process)


def child_environment() -> dict[str, str]:
    """The environment of servers and load generator.

    Imports never come from the current folder. On CPU both servers get a cache of 1 GiB, unless
    the user sets another size: one that follows the free memory would differ between them.
    """
    return {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | {"PYTHONSAFEPATH": "1"}


def run_child(
    command: Sequence[str], what: str, seconds: float, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end.

    Args:
        command: the program and its arguments.
        what: for messages.
        seconds: that it may take.
        environment: of the process.

    Raises:
        MachineError: it took longer.
    """
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=environment,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise MachineError(f"{what} was not done after {seconds} s.") from error


def last_words(done: subprocess.CompletedProcess[str]) -> str:
    """The last line that a process wrote to its standard error, for messages."""
    return (done.stderr.strip().splitlines() or ["no message"])[-1]


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _await_health(process: subprocess.Popen[bytes], url: str, log: Path, log_start: int) -> None:
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise MachineError(
                f"the server ended with code {process.returncode}: {_tail(log, log_start)}"
            )
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 (own http URL)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise MachineError(
        f"the server was not healthy after {START_SECONDS} s: {_tail(log, log_start)}"
    )


def _tail(log: Path, log_start: int) -> str:
    """The last error, or else the last line, that this server wrote."""
    text = log.read_bytes()[log_start:].decode("utf-8", errors="replace")
    errors = [line for line in text.splitlines() if "Error" in line]
    last = (errors or text.splitlines() or ["no output"])[-1].strip()
    return f"{last[:300]} (whole log: {log})"


def _stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM first; the process group is killed when that does not end it."""
    try:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        logger.warning("the server ignored SIGTERM for %d s and is killed", STOP_SECONDS)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
