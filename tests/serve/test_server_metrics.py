"""/metrics of a running server: ours, vLLM's, and what Prometheus makes of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
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
from conftest import Pack

import gblm
from gblm.bench.server import free_port
from gblm.checkpoint.inspect import inspect
from gblm.kernels import BACKENDS
from gblm.model.folder import ModelFolder

pytestmark = pytest.mark.vllm
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


def test_metrics_say_what_is_served(server: tuple, pack_tiny: Pack, best_backend: str) -> None:
    folder = pack_tiny()
    (group,) = inspect(ModelFolder.open(folder))["groups"]
    how = ("tiny", "linears", group["format"], group["pattern"], group["dtype"])
    manifest = hashlib.sha256((folder / "MANIFEST.json").read_bytes()).hexdigest()
    running = dict.fromkeys(BACKENDS, 0) | {best_backend: 8}
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


@pytest.mark.skipif(PROMETHEUS is None, reason="no Prometheus: .ci/run installs it")
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
    assert text.count("/run/secrets/api-key") == 1
    (folder / "api-key").write_text("secret")
    text = text.replace("/run/secrets/api-key", str(folder / "api-key"))
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
