"""/metrics of a running server: ours and vLLM's, and whether deploy/ asks for what is there."""

from __future__ import annotations

import hashlib
import urllib.request
from collections.abc import Iterator

import promql
import pytest
from conftest import Pack

import gblm
from gblm.bench.metrics import COUNTERS, START
from gblm.checkpoint.inspect import inspect
from gblm.kernels import BACKENDS
from gblm.model.folder import ModelFolder

pytestmark = pytest.mark.vllm


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


def test_dashboard_alerts_and_watch_read_what_there_is(server: tuple, client: object) -> None:
    client.completions.create(model="tiny", prompt="abc", max_tokens=2)
    queries = [*promql.of_alerts(), *promql.of_panels(), *promql.of_variables()]
    read = set().union(*map(promql.metrics, queries))
    assert len(read) > 20
    found = {name for name, _, _ in samples(scraped(server[0]))}
    # Prometheus itself writes this one down at every scrape.
    assert read - found == {"up"}
    # The plugin hides nothing that `gblm bench watch` reads of vLLM.
    assert {*COUNTERS, START} <= found


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
