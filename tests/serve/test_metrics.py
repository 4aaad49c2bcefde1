"""From the reports of the workers to the metrics of a server, without one."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from legacy_cases import FIXTURES
from vllm_linear import weight_for

from gblm.checkpoint.inspect import inspect
from gblm.formats import from_spec
from gblm.kernels import BACKENDS
from gblm.serve.vllm_plugin.prepared import Stored, grouped, weights_sha256

metrics = pytest.importorskip(
    "gblm.serve.vllm_plugin.metrics", reason="prometheus_client is not installed"
)


def worker(stage: int = 0, **backends: int) -> dict:
    return {"model_name": "m", "stage": stage, "backends": backends}


def values(found: list) -> dict[str, dict[str, float]]:
    """Per metric its values, by the last label."""
    return {
        family.name: {[*sample.labels.values()][-1]: sample.value for sample in family.samples}
        for family in found
    }


def running(*reports: dict) -> dict[str, float]:
    return values(metrics.families(reports))["gblm_linears"]


def counts(**linears: int) -> dict[str, int]:
    return dict.fromkeys(BACKENDS, 0) | linears


def test_tensor_parallel_ranks_share_their_linears() -> None:
    assert running(worker(cpu=8), worker(cpu=8)) == counts(cpu=8)


def test_pipeline_stages_add_up() -> None:
    assert running(worker(0, cpu=4), worker(1, cpu=5), worker(1, cpu=5))["cpu"] == 9


def test_ranks_that_disagree_show_both_backends() -> None:
    assert running(worker(cpu=8), worker(cpu=6, reference=2)) == counts(cpu=8, reference=2)


def test_workers_are_counted() -> None:
    assert values(metrics.families([worker(), worker()]))["gblm_workers"] == {"m": 2}


def test_no_reports_no_metrics() -> None:
    assert metrics.families([]) == []


def test_reports_are_read_as_they_come_and_kept() -> None:
    reports = metrics.Reports()
    folder = reports.new_folder()
    assert reports.collect() == []
    path = folder / "1.json"
    path.write_text(json.dumps(worker(cpu=8)))
    assert values(reports.collect())["gblm_linears"]["cpu"] == 8
    path.unlink()  # as a system does that empties /tmp
    assert values(reports.collect())["gblm_linears"]["cpu"] == 8
    path.write_text(json.dumps(worker(dense=8)))
    assert values(reports.collect())["gblm_linears"] == counts(dense=8)


def test_facts_are_those_of_inspect(pack_tiny: Callable[..., Path]) -> None:
    folder = pack_tiny(pattern="0.5", values="int4", head="int8", tied=False)
    facts = inspect(folder)
    found = metrics.checkpoint_facts(folder)
    expected = [("linears", group) for group in facts["groups"]] + [("head", facts["head"])]
    assert [
        (group["part"], group["format"], group["pattern"], group["values"], group["linears"],
         group["bytes"], group["bytes_dense"])
        for group in found["groups"]
    ] == [
        (part, group["format"], group["pattern"], group["dtype"], group["linears"], group["bytes"],
         group["bytes_dense"])
        for part, group in expected
    ]  # fmt: skip


def foreign(rank: int, stage: int, *stored: object) -> dict:
    facts = {"prepared": grouped(stored)} | ({} if rank else {"manifest_sha256": "a" * 64})
    return worker(stage, cpu=len(stored)) | facts


def test_what_is_packed_while_loading_is_counted_where_it_is(tmp_path: Path) -> None:
    """Two ranks of each of two stages; each holds its share of every linear."""
    floats, codes = Stored("nm", "2:4", "bfloat16", 90, 160), Stored("nm", "2:4", "int4:row", 7, 32)
    reports = [foreign(0, 0, floats, floats, codes), foreign(1, 0, floats, floats, codes),
               foreign(2, 1, floats), foreign(3, 1, floats)]  # fmt: skip
    found = values(metrics.families(reports))
    assert found["gblm_stored_linears"] == {"bfloat16": 3, "int4:row": 1}
    assert found["gblm_packed_bytes"] == {"bfloat16": 6 * 90, "int4:row": 2 * 7}
    assert found["gblm_dense_bytes"] == {"bfloat16": 6 * 160, "int4:row": 2 * 32}
    info = next(f for f in metrics.families(reports) if f.name == "gblm_checkpoint_info")
    assert [sample.labels["manifest_sha256"] for sample in info.samples] == ["a" * 64]


def test_stored_is_what_the_parts_weigh() -> None:
    fmt = from_spec("nm/2:4/int4:row")
    parts = fmt.pack("w", weight_for(fmt, (16, 64)))
    found = Stored.of(fmt, parts, (16, 64), torch.bfloat16)
    assert found == ("nm", "2:4", "int4:row", 16 * (16 + 8 + 2), 16 * 64 * 2)


def test_the_hash_of_others_weights_is_that_of_sha256sum(tmp_path: Path) -> None:
    for name in ("b.safetensors", "a.safetensors", "config.json"):
        (tmp_path / name).write_text(name * 1000)
    command = "sha256sum *.safetensors | sha256sum"
    done = subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == weights_sha256(tmp_path)
    (tmp_path / "b.safetensors").write_text("another")
    assert done.stdout.split()[0] != weights_sha256(tmp_path)


@pytest.mark.vllm
@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_of_others_is_reported(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import vllm.config
    import vllm.distributed

    source = FIXTURES / "24-bitmask"
    config = SimpleNamespace(
        model_config=SimpleNamespace(model=str(source), revision=None, served_model_name="m"),
        load_config=SimpleNamespace(download_dir=None),
    )
    monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: config)
    for name in ("get_pp_group", "get_world_group"):
        group = SimpleNamespace(rank_in_group=rank)
        monkeypatch.setattr(vllm.distributed, name, lambda group=group: group)
    stored = [Stored("nm", "2:4", "bfloat16", 90, 160)]
    metrics.report(tmp_path, {"cpu": 1}, stored)
    (path,) = tmp_path.glob("*.json")
    hashes = {} if rank else {"manifest_sha256": weights_sha256(source)}
    assert json.loads(path.read_text()) == worker(rank, cpu=1) | {
        "prepared": grouped(stored),
        **hashes,
    }


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    assert metrics.local_folder("org/name", None, str(tmp_path)) == snapshot
    assert metrics.local_folder(str(tmp_path), None, None) == tmp_path


SEVERAL_SERVERS = """
import os
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from gblm.serve.vllm_plugin.metrics import families, publish

first, second = ({"model_name": "m", "stage": n, "backends": {"cpu": 4}} for n in (0, 1))
if os.fork() == 0:
    publish(families([first, second]))
    os._exit(0)
os.wait()
publish(families([first]))
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode())
"""


def test_several_api_servers_show_the_complete_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(metrics.MULTIPROCESS_VARIABLE, str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", SEVERAL_SERVERS], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("gblm_")]
    counts = {name: 8.0 if name == "cpu" else 0.0 for name in sorted(BACKENDS)}
    assert sorted(lines) == [
        *(f'gblm_linears{{backend="{n}",model_name="m"}} {count}' for n, count in counts.items()),
        'gblm_workers{model_name="m"} 2.0',
    ]


@pytest.mark.vllm
def test_a_report_that_fails_does_not_end_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import vllm.config
    import vllm.distributed

    config = SimpleNamespace(
        model_config=SimpleNamespace(model="org/none", revision=None, served_model_name="m"),
        load_config=SimpleNamespace(download_dir=str(tmp_path)),
    )
    monkeypatch.setattr(vllm.config, "get_current_vllm_config_or_none", lambda: config)
    stage = SimpleNamespace(rank_in_group=1)
    monkeypatch.setattr(vllm.distributed, "get_pp_group", lambda: stage)
    with caplog.at_level(logging.WARNING, "gblm"):
        metrics.report(tmp_path, {"cpu": 8})
    assert "cannot describe the checkpoint" in caplog.text
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text()) == worker(1, cpu=8)
    assert values(metrics.families([worker(1, cpu=8)]))["gblm_checkpoint_info"] == {}
    with caplog.at_level(logging.WARNING, "gblm"):
        metrics.report(tmp_path / "nowhere", {"cpu": 8})
    assert "does not count this worker" in caplog.text
