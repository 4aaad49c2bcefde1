"""`gblm serve` as a process: the official client, streaming, how it ends; and the A/B benchmark."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import promql
import pytest
from conftest import Outcome

import gblm
from gblm.bench.server import free_port
from gblm.checkpoint.inspect import inspect

pytestmark = pytest.mark.vllm
OPTIONS = ["--enforce-eager", "--max-model-len", "256"]
PROMETHEUS = shutil.which("prometheus")
VLLM_ALONE = """
import sys
from prometheus_client import generate_latest
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.metrics.loggers import PrometheusStatLogger

arguments = EngineArgs(model=sys.argv[1], enforce_eager=True, max_model_len=256)
PrometheusStatLogger(arguments.create_engine_config(), [0]).log_engine_initialized()
print(generate_latest().decode())
"""
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


def test_metrics_say_what_is_served(
    server: tuple, pack_tiny: Callable[..., Path], best_backend: str
) -> None:
    folder = pack_tiny()
    (group,) = inspect(folder)["groups"]
    how = ("tiny", "linears", group["format"], group["pattern"], group["dtype"])
    manifest = hashlib.sha256((folder / "MANIFEST.json").read_bytes()).hexdigest()
    running = {backend: 0 for backend in ("cpu", "reference", "dense")} | {best_backend: 8}
    assert f"8 linears run on backend {best_backend} " in server[2].read_text()
    assert ours(scraped(server[0])) == {
        "gblm_linears": {("tiny", backend): count for backend, count in running.items()},
        "gblm_workers": {("tiny",): 1},
        "gblm_stored_linears": {how: group["linears"]},
        "gblm_packed_bytes": {how: group["bytes"]},
        "gblm_dense_bytes": {how: group["bytes_dense"]},
        "gblm_checkpoint_info": {("tiny", manifest, gblm.__version__): 1},
    }


def test_metrics_of_vllm_are_those_without_the_plugin(server: tuple, tiny: Path) -> None:
    alone = subprocess.run(
        [sys.executable, "-c", VLLM_ALONE, str(tiny)], env=os.environ | {"VLLM_PLUGINS": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = {line for line in scraped(server[0]).splitlines() if line.startswith("# TYPE ")}
    # The instrumented HTTP server is not there without a server.
    others = {line for line in found if not line.startswith(("# TYPE gblm_", "# TYPE http_"))}
    assert others == {line for line in alone.stdout.splitlines() if line.startswith("# TYPE ")}
    assert any("process_start_time_seconds" in line for line in others)


def test_queries_of_dashboard_and_alerts_name_what_there_is(server: tuple, client: object) -> None:
    client.completions.create(model="tiny", prompt="abc", max_tokens=2)
    queries = [*promql.of_alerts(), *promql.of_panels(), *promql.of_variables()]
    read = set().union(*map(promql.metrics, queries))
    assert len(read) > 20
    # Prometheus itself writes this one down at every scrape.
    assert read - {name for name, _, _ in samples(scraped(server[0]))} == {"up"}


@pytest.mark.skipif(PROMETHEUS is None, reason="Prometheus (Debian's package) is not installed")
def test_prometheus_scrapes_the_server_and_answers_the_dashboard(
    server: tuple, client: object, tmp_path: Path
) -> None:
    with prometheus(server[0].removeprefix("http://"), tmp_path) as ask:
        waited(lambda: ask("query", query='up{job="gblm"} == 1')["result"])
        client.completions.create(model="tiny", prompt="abc", max_tokens=4)
        # Rates take two scrapes after the request.
        for query in (*promql.of_panels(), *promql.of_variables()):
            waited(lambda query=query: ask("query", query=query)["result"], lambda q=query: q)
        generated = "sum(increase(vllm:generation_tokens_total[2m])) > 0"
        waited(lambda: ask("query", query=generated)["result"])
        running = "sum(gblm_linears)"
        assert ask("query", query=running)["result"][0]["value"][1] == "8"
        (group,) = waited(lambda: evaluated(ask("rules")["groups"]))
        assert {rule["health"] for rule in group["rules"]} == {"ok"}
        assert [rule["query"] for rule in group["rules"] if rule["state"] == "firing"] == []


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


def scraped(url: str) -> str:
    with urllib.request.urlopen(f"{url}/metrics", timeout=20) as answer:
        return answer.read().decode()


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    from prometheus_client.parser import text_string_to_metric_families

    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            yield sample.name, sample.labels, sample.value


def ours(text: str) -> dict[str, dict[tuple[str, ...], float]]:
    """Per metric of gblm its values, by the values of the labels in their usual order."""
    order = ("model_name", "backend", "part", "format", "pattern", "values", "manifest_sha256",
             "version")  # fmt: skip
    found: dict[str, dict[tuple[str, ...], float]] = {}
    for name, labels, value in samples(text):
        if name.startswith("gblm_"):
            assert labels.keys() <= {*order}
            key = tuple(labels[label] for label in order if label in labels)
            found.setdefault(name, {})[key] = value
    return found


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[Callable[..., dict]]:
    """Prometheus with deploy/'s configuration, every second; asks its API."""
    text = (promql.ALERTS.parent / "prometheus.yml").read_text()
    assert text.count("server:8000") == 1
    assert text.count("15s") == 2
    (folder / "prometheus.yml").write_text(text.replace("server:8000", target).replace("15s", "1s"))
    shutil.copy(promql.ALERTS, folder)
    address = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [str(PROMETHEUS), f"--config.file={folder}/prometheus.yml",
             f"--storage.tsdb.path={folder}/data", f"--web.listen-address={address}"],
            stdout=log, stderr=log,
        )  # fmt: skip

    def ask(what: str, **words: str) -> dict:
        url = f"http://{address}/api/v1/{what}?{urllib.parse.urlencode(words)}"
        with urllib.request.urlopen(url, timeout=20) as answer:
            return json.load(answer)["data"]

    try:
        waited(lambda: answers(address), lambda: (folder / "log").read_text())
        yield ask
    finally:
        process.terminate()
        process.wait(60)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"http://{address}/-/ready", timeout=5).close()
    except OSError:
        return False
    return True


def evaluated(groups: list[dict]) -> list[dict]:
    """The groups of rules, once all of them were evaluated."""
    rules = [rule for group in groups for rule in group["rules"]]
    return groups if rules and all(rule["health"] != "unknown" for rule in rules) else []


def waited(look: Callable[[], object], why: Callable[[], str] = str) -> object:
    """What is found within two minutes."""
    limit = time.monotonic() + 120
    while not (found := look()):
        assert time.monotonic() < limit, why()
        time.sleep(0.3)
    return found


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
