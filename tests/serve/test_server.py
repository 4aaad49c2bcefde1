"""`gblm serve` as a process: the official client, streaming, how it ends; and the A/B benchmark."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import Outcome

from gblm.bench.server import free_port

pytestmark = pytest.mark.vllm
OPTIONS = ["--enforce-eager", "--max-model-len", "256"]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@contextmanager
def served(folder: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen, Path]]:
    """URL, process and log of `gblm serve`, once it is healthy."""
    port = free_port()
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "gblm", "serve", str(folder), "--port", str(port),
             "--name", "tiny", "--", *OPTIONS, "--chat-template", TEMPLATE],
            stdout=stream, stderr=stream, env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    limit = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < limit:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            break
        except OSError:
            time.sleep(0.5)
    assert process.poll() is None, log.read_text()
    yield url, process, log
    if process.poll() is None:
        process.kill()
    process.wait()


@pytest.fixture(scope="module")
def server(
    pack_tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, subprocess.Popen, Path]]:
    with served(pack_tiny(), tmp_path_factory.mktemp("serve") / "log") as running:
        yield running


@pytest.fixture
def client(server: tuple) -> object:
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", timeout=60)


def test_completion(client: object) -> None:
    done = client.completions.create(model="tiny", prompt="abc", max_tokens=5, temperature=0)
    assert done.usage.completion_tokens == 5


def test_chat(client: object) -> None:
    messages = [{"role": "user", "content": "hello"}]
    done = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4)
    assert done.choices[0].message.role == "assistant"


def test_streaming_gives_the_same_text(client: object) -> None:
    ask = {"model": "tiny", "prompt": "abc", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**ask).choices[0].text
    pieces = [part.choices[0].text for part in client.completions.create(stream=True, **ask)]
    assert len(pieces) > 1
    assert "".join(pieces) == whole


def test_log_says_which_backend_runs(server: tuple, best_backend: str) -> None:
    line = f"8 linears run on backend {best_backend} (packed in memory)"
    assert line in server[2].read_text()


def test_too_many_answers_are_refused(client: object) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="at most 64"):
        client.completions.create(model="tiny", prompt="abc", max_tokens=1, n=65)


def test_sigterm_finishes_requests_and_ends_the_server_and_its_children(server: tuple) -> None:
    import psutil

    url, process, log = server
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    with stream_tokens(url, 200) as lines:
        next(lines)
        process.send_signal(signal.SIGTERM)
        rest = [line for line in lines if line.startswith(b"data: {")]
    answers = [json.loads(line[6:])["choices"][0] for line in rest]
    assert answers[-1]["finish_reason"] == "length"
    assert process.wait(60) == 0, log.read_text()[-2000:]
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{url}/health", timeout=2)


def test_a_killed_engine_ends_the_server_with_an_error(
    pack_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    import psutil

    with served(pack_tiny(), tmp_path / "log") as (_, process, log):
        children = psutil.Process(process.pid).children(recursive=True)
        (engine,) = (child for child in children if "EngineCore" in " ".join(child.cmdline()))
        engine.kill()
        assert process.wait(60) > 0, log.read_text()[-2000:]
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive


@contextmanager
def stream_tokens(url: str, count: int) -> Iterator[Iterator[bytes]]:
    """Lines of a streamed answer of so many tokens."""
    body = {"model": "tiny", "prompt": "abc", "max_tokens": count, "ignore_eos": True,
            "stream": True}  # fmt: skip
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        yield iter(answer)


def test_bench_compares_two_servers(
    gblm: Callable[..., Outcome], pack_tiny: Callable[..., Path], tiny: Path, tmp_path: Path,
    best_backend: str,
) -> None:  # fmt: skip
    done = gblm(
        "bench", "serving", pack_tiny(), "--baseline", tiny, "--num-prompts", 2, "--input-len", 8,
        "--output-len", 4, "--repeat", 1, "--output", "record.json", "--log", "log",
        "--", *OPTIONS, VLLM_CPU_KVCACHE_SPACE="1",
    )  # fmt: skip
    assert done.code == 0, (done, (tmp_path / "log").read_text()[-3000:])
    record = json.loads((tmp_path / "record.json").read_text())
    assert [run["side"] for run in record["runs"]] == ["baseline", "model"]
    assert record["backend_used"] == best_backend
    assert record["provenance"]["packages"]["torch"]
    for row in record["summary"].values():
        assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"]
    assert record["summary"]["weights_mb"]["ratio"] < 1
    assert "TTFT, median (ms)" in done.out


def test_server_that_cannot_start_is_reported_with_its_reason(
    gblm: Callable[..., Outcome], pack_tiny: Callable[..., Path], tiny: Path
) -> None:
    done = gblm("bench", "serving", pack_tiny(), "--baseline", tiny, "--repeat", 1, "--log", "log",
                "--", "--max-model-len", "100000")  # fmt: skip
    assert done.code == 3, done
    assert "the server ended with code" in done.err
