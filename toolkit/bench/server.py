"""A model in vLLM's server: started by `gblm serve`, put under load by `vllm bench serve`."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from gblm.bench.metrics import Target, samples
from gblm.bench.requests import Load, Request, Seen
from gblm.bench.sides import (
    Side,
    bound_to,
    child_environment,
    last_error,
    memory_mb,
    size_of,
    stop,
)
from gblm.errors import MachineError
from gblm.network import KEY_VARIABLE

START_SECONDS, LOAD_SECONDS = 900, 3600
# Of the random prompts, which are the same for all sides.
SEED = 0
PREEMPTIONS = "vllm:num_preemptions_total"
HITS, QUERIES = "vllm:prefix_cache_hits_total", "vllm:prefix_cache_queries_total"
COUNTED = (PREEMPTIONS, HITS, QUERIES)
CACHE_OPTIONS = ("--enable-prefix-caching", "--no-enable-prefix-caching")
RESULT = "result.json"


@dataclass(frozen=True)
class RunningServer:
    """A server that answers /health, `ready_seconds` after its parent process was started.

    Its output begins at `log_start` in the log.
    """

    url: str
    ready_seconds: float
    process: subprocess.Popen[bytes]
    log: Path
    log_start: int

    def backends(self) -> dict[str, int]:
        """Count the linears on each backend by the plugin's log line; {} if the model is dense."""
        text = self.log.read_bytes()[self.log_start :].decode("utf-8", errors="replace")
        found = re.findall(r"gblm: (\d+) linears run on backend (\w+)", text)
        return {backend: int(count) for count, backend in found}


@contextmanager
def running_server(
    folder: Path,
    backend: str | None,
    options: tuple[str, ...],
    log: Path,
    shutdown_timeout: int = 5,
    threads: int | None = None,
) -> Iterator[RunningServer]:
    """Start a server on a free port of 127.0.0.1 and stop it at the end.

    Args:
        folder: the model.
        backend: for packed weights; the best one if None.
        options: for vLLM.
        log: file that receives the server's output.
        shutdown_timeout: seconds that running requests get after SIGTERM.
        threads: of vLLM; its own choice if None.

    Raises:
        MachineError: the server ended, or was not healthy in time; the log's end is quoted.
    """
    port = free_port()
    command = [sys.executable, "-m", "gblm", "serve", str(folder), "--port", str(port),
               "--shutdown-timeout", str(shutdown_timeout)]  # fmt: skip
    if backend is not None:
        command += ["--backend", backend]
    command += ["--", "--served-model-name", "model", *options]
    began, log_start = time.monotonic(), size_of(log)
    env = child_environment(options) | bound_to(threads)
    env.pop(KEY_VARIABLE, None)  # nobody else reaches the server, and the load has no key
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, start_new_session=True, env=env
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _await_health(process, url, log, log_start)
        yield RunningServer(url, time.monotonic() - began, process, log, log_start)
    finally:
        stop(process)


def free_port() -> int:
    """Find a TCP port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


class ServerSide(Side):
    """A side that vLLM serves; each load comes from a process of its own."""

    def start(self) -> None:
        """Start `gblm serve` and wait until it is healthy."""
        self._stack = ExitStack()
        self._work = Path(self._stack.enter_context(tempfile.TemporaryDirectory()))
        self._server = self._stack.enter_context(
            running_server(
                self.path,
                self.backend,
                self._options(),
                self.setup.log,
                threads=self.setup.threads,
            )
        )
        self._backends = self._server.backends()

    def load(self, load: Load) -> Seen:
        """Run the load generator, and read what the server counted meanwhile."""
        before = counters(self._server)
        words = bench_words(self._server.url, self.path, load, SEED, self._work)
        seen = seen_of(run_vllm_bench(words, self._work / RESULT))
        seen.prompts = _fingerprint(self.path, load)
        grown = {name: value - before[name] for name, value in counters(self._server).items()}
        seen.preemptions = grown[PREEMPTIONS]
        seen.cached = grown[HITS] / grown[QUERIES] if grown[QUERIES] else 0.0
        seen.extra |= {
            "load_s": self._server.ready_seconds, "memory_mb": memory_mb(self.process.pid),
        }  # fmt: skip
        return seen

    def stop(self) -> None:
        """Stop the server."""
        self._stack.close()

    @property
    def process(self) -> psutil.Process:
        """Find the server's parent process."""
        return psutil.Process(self._server.process.pid)

    def facts(self) -> dict[str, Any]:
        """Add the backends that the server said it runs on."""
        return super().facts() | {"linears_by_backend": self._backends}

    def _options(self) -> tuple[str, ...]:
        """Switch the prefix cache off unless the user sets it: it would spare repeated prompts."""
        given = self.setup.options
        if any(option.partition("=")[0] in CACHE_OPTIONS for option in given):
            return given
        return (*given, "--no-enable-prefix-caching")


def bench_words(url: str, folder: Path, load: Load, seed: int, work: Path) -> list[str]:
    """Give the options of `vllm bench serve` for a server that calls its model "model".

    Args:
        url: of the server.
        folder: the model, for its tokenizer.
        load: what is asked.
        seed: of the random prompts.
        work: folder for the result, which is called RESULT.
    """
    return [
        "--base-url", url, "--model", str(folder), "--tokenizer", str(folder),
        "--served-model-name", "model", "--dataset-name", "random",
        "--random-input-len", str(load.prompt_len), "--random-output-len", str(load.output_len),
        "--random-range-ratio", "0", "--num-prompts", str(load.num_prompts),
        "--max-concurrency", str(load.concurrency), "--num-warmups", "1", "--ignore-eos",
        "--seed", str(seed), "--disable-tqdm", "--temperature", "0",
        "--save-result", "--save-detailed",
        "--result-dir", str(work), "--result-filename", RESULT,
    ]  # fmt: skip


def run_vllm_bench(words: list[str], file: Path) -> dict[str, Any]:
    """Run `vllm bench serve` in a process of its own.

    Args:
        words: its options.
        file: where they say that the result shall be; it is removed.

    Raises:
        MachineError: it failed, or wrote nothing.
    """
    environment = child_environment()
    # vLLM divides by the seconds of its progress bar, which are 0 where bars are switched off.
    environment.pop("TQDM_DISABLE", None)
    command = [sys.executable, "-m", "gblm.serve.vllm_cli", "bench", "serve", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False,
                              env=environment, timeout=LOAD_SECONDS)  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise MachineError(f"vllm bench serve was not done after {LOAD_SECONDS} s.") from error
    if done.returncode or not file.exists():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise MachineError(f"vllm bench serve ended with code {done.returncode}: {last}")
    result: dict[str, Any] = json.loads(file.read_text())
    file.unlink()
    return result


def seen_of(result: dict[str, Any]) -> Seen:
    """Take the requests out of a detailed result of `vllm bench serve`."""
    keys = ("start_times", "latencies", "input_lens", "output_lens", "ttfts", "itls", "errors")
    rows = list(zip(*(result[key] for key in keys), strict=True))
    requests = [
        Request(start, latency, prompt, output, ttft, tuple(itls))
        for start, latency, prompt, output, ttft, itls, error in rows
        if not error
    ]
    return Seen(requests, result["duration"], failed=len(rows) - len(requests))


def counters(server: RunningServer) -> dict[str, float]:
    """Read the server's counters of preemptions and prefix cache, over all engines.

    Raises:
        MachineError: it does not tell.
    """
    found: dict[str, float] = {}
    for sample in samples(Target.of("A", server.url).fetch()):
        if sample.name in COUNTED:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    if missing := [name for name in COUNTED if name not in found]:
        raise MachineError(f"the server counts no {missing[0]}: it is needed to check a run.")
    return found


def _fingerprint(folder: Path, load: Load) -> str:
    """Hash what the prompts follow from, as vLLM does not write them down."""
    digest = hashlib.sha256(repr((load.num_prompts, load.prompt_len, SEED)).encode())
    for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json"):
        path = folder / name
        if path.exists():
            digest.update(path.read_bytes())
    return f"vllm:{digest.hexdigest()}"


def _await_health(process: subprocess.Popen[bytes], url: str, log: Path, log_start: int) -> None:
    limit = time.monotonic() + START_SECONDS
    while time.monotonic() < limit:
        if process.poll() is not None:
            raise MachineError(
                f"the server ended with code {process.returncode}: {last_error(log, log_start)}"
            )
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 (own http URL)
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise MachineError(
        f"the server was not healthy after {START_SECONDS} s: {last_error(log, log_start)}"
    )
