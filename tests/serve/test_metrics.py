"""From the reports of the workers to the metrics of a server, without one."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import Pack

from gblm.checkpoint.inspect import inspect
from gblm.kernels import BACKENDS
from gblm.model.folder import ModelFolder

metrics = pytest.importorskip(
    "gblm.serve.vllm_plugin.metrics",
    reason="prometheus_client: make dev installs it",
)


def worker(stage: int = 0, **backends: int) -> dict:
    return {"model_name": "m", "stage": stage, "backends": backends}


def values(found: list) -> dict[str, dict[str, float]]:
    """Per metric its values, by the last label."""
    return {
        family.name: {[*sample.labels.values()][-1]: sample.value for sample in family.samples}
        for family in found
    }


def counts(**linears: int) -> dict[str, int]:
    return dict.fromkeys(BACKENDS, 0) | linears


@pytest.mark.parametrize(
    ("reports", "linears"),
    [
        ([worker(cpu=8), worker(cpu=8)], counts(cpu=8)),  # ranks share their linears
        ([worker(0, cpu=4), worker(1, cpu=5), worker(1, cpu=5)], counts(cpu=9)),  # stages add up
        ([worker(cpu=8), worker(cpu=6, reference=2)], counts(cpu=8, reference=2)),
    ],
)
def test_ranks_stages_and_those_that_disagree_are_counted(
    reports: list[dict], linears: dict[str, int]
) -> None:
    found = values(metrics.families(reports))
    assert found["gblm_linears"] == linears
    assert found["gblm_workers"] == {"m": len(reports)}


def test_reports_are_read_as_they_come_and_kept() -> None:
    reports = metrics.Reports()
    folder = reports.new_folder()
    assert reports.collect() == metrics.families([]) == []
    path = folder / "1.json"
    path.write_text(json.dumps(worker(cpu=8)))
    assert values(reports.collect())["gblm_linears"]["cpu"] == 8
    path.unlink()  # as a system does that empties /tmp
    assert values(reports.collect())["gblm_linears"]["cpu"] == 8
    path.write_text(json.dumps(worker(dense=8)))
    assert values(reports.collect())["gblm_linears"] == counts(dense=8)


def test_facts_are_those_of_inspect(pack_tiny: Pack) -> None:
    folder = pack_tiny(pattern="0.5", values="int4", head="int8", tied=False)
    facts = inspect(ModelFolder.open(folder))
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


def test_a_hub_id_is_found_in_the_cache(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("0" * 40)
    assert metrics.local_folder("org/name", None, str(tmp_path)) == snapshot
    assert metrics.local_folder(str(tmp_path), None, None) == tmp_path


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
