"""Add gblm's metrics to vLLM's: which backends the workers run, and what the checkpoint holds.

vLLM hands the SparseConfig of the process that answers /metrics to its workers. It names a folder:
each worker leaves one small file there when its weights are prepared, and scrapes read these. A
stat logger would make vLLM keep statistics under --disable-log-stats, too, for every model.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prometheus_client import REGISTRY
from prometheus_client.metrics_core import GaugeMetricFamily
from prometheus_client.registry import Collector

import gblm
from gblm.checkpoint.inspect import inspect
from gblm.errors import GblmError
from gblm.files import read_json, sha256, write_json
from gblm.kernels import BACKENDS
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import MANIFEST_FILE

logger = logging.getLogger(__name__)

Report = dict[str, Any]
GROUP = ("part", "format", "pattern", "values")


class Reports(Collector):
    """Collects the reports of this server's workers for the registry that /metrics shows."""

    def __init__(self) -> None:
        self._folders: list[TemporaryDirectory[str]] = []
        self._known: dict[Path, tuple[int, Report]] = {}

    def new_folder(self) -> Path:
        """Make a folder for the workers of one model; it is removed when this process ends."""
        self._folders.append(TemporaryDirectory(prefix="gblm-", ignore_cleanup_errors=True))
        return Path(self._folders[-1].name)

    def collect(self) -> list[GaugeMetricFamily]:
        """Give what is known now; a report stays known if something empties the folder."""
        for folder in self._folders:
            for path in Path(folder.name).glob("*.json"):
                stamp = path.stat().st_mtime_ns
                if self._known.get(path, (None,))[0] != stamp:
                    self._known[path] = (stamp, read_json(path))
        return families(report for _, report in self._known.values())


@cache
def reports() -> Reports:
    """Get the one collector of this process; the first call registers it."""
    collector = Reports()
    REGISTRY.register(collector)
    return collector


def report(folder: Path | None, backends: Mapping[str, int]) -> None:
    """Say what this worker runs; called when all of its weights are prepared.

    Args:
        folder: of `Reports.new_folder`, made by the server's process; None where there is none.
        backends: linears by the name of their backend.
    """
    from vllm.config import get_current_vllm_config_or_none
    from vllm.distributed import get_pp_group

    current = get_current_vllm_config_or_none()
    if folder is None or current is None:
        return
    model = current.model_config
    found: Report = {
        "model_name": model.served_model_name,
        "stage": get_pp_group().rank_in_group,
        "backends": dict(backends),
    }
    try:
        source = local_folder(model.model, model.revision, current.load_config.download_dir)
        found |= checkpoint_facts(source)
    except Exception as error:  # of the hub's client, too: none of them may end a server
        logger.warning("gblm: /metrics cannot describe the checkpoint: %s", error)
    try:
        write_json(folder / f"{os.getpid()}.json", found)
    except GblmError as error:
        logger.warning("gblm: /metrics does not count this worker: %s", error)


def local_folder(model: str, revision: str | None, cache_dir: str | None) -> Path:
    """Find where vLLM has loaded a model from: its folder, or the hub's snapshot in the cache."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(model, revision=revision, cache_dir=cache_dir, local_files_only=True)
    )


def checkpoint_facts(folder: Path) -> Report:
    """Look up what `gblm inspect` says of a packed folder, and hash its list of hashes."""
    facts = inspect(ModelFolder.open(folder))
    parts = [("linears", group) for group in facts["groups"]]
    parts += [("head", facts["head"])] if "head" in facts else []
    manifest = folder / MANIFEST_FILE
    return {
        "manifest_sha256": sha256(manifest) if manifest.is_file() else "",
        "groups": [
            {"part": part, "format": group["format"], "pattern": group["pattern"],
             "values": group["dtype"], "linears": group["linears"], "bytes": group["bytes"],
             "bytes_dense": group["bytes_dense"]}
            for part, group in parts
        ],
    }  # fmt: skip


def families(found: Iterable[Report]) -> list[GaugeMetricFamily]:
    """Make the metrics of a server from the reports of its workers; none without reports."""
    models: dict[str, list[Report]] = {}
    for one in found:
        models.setdefault(one["model_name"], []).append(one)
    return [*_running(models), *_stored(models)] if models else []


def _running(models: Mapping[str, list[Report]]) -> list[GaugeMetricFamily]:
    linears = GaugeMetricFamily(
        "gblm_linears",
        "Linears by the backend that runs them; what vLLM fuses is one, a packed head is another.",
        labels=["model_name", "backend"],
    )
    workers = GaugeMetricFamily(
        "gblm_workers", "Worker processes that the counts come from.", labels=["model_name"]
    )
    for name, own in models.items():
        workers.add_metric([name], len(own))
        for backend in BACKENDS:
            linears.add_metric([name, backend], _count(own, backend))
    return [linears, workers]


def _count(own: Iterable[Report], backend: str) -> int:
    """Count a backend's linears: ranks of a pipeline stage share them, stages have their own."""
    stages: dict[int, int] = {}
    for one in own:
        stage = one["stage"]
        stages[stage] = max(stages.get(stage, 0), one["backends"].get(backend, 0))
    return sum(stages.values())


def _stored(models: Mapping[str, list[Report]]) -> list[GaugeMetricFamily]:
    labels = ["model_name", *GROUP]
    stored = {
        "linears": GaugeMetricFamily(
            "gblm_stored_linears", "Packed linears in the checkpoint.", labels=labels
        ),
        "bytes": GaugeMetricFamily(
            "gblm_packed_bytes", "Bytes of packed weights in the checkpoint.", labels=labels
        ),
        "bytes_dense": GaugeMetricFamily(
            "gblm_dense_bytes", "Bytes of the same weights without packing.", labels=labels
        ),
    }
    info = GaugeMetricFamily(
        "gblm_checkpoint_info",
        f"The sha256 of {MANIFEST_FILE} and the version of gblm.",
        labels=["model_name", "manifest_sha256", "version"],
    )
    for name, own in models.items():
        facts = next((one for one in own if "manifest_sha256" in one), None)
        if facts is None:
            continue
        info.add_metric([name, facts["manifest_sha256"], gblm.__version__], 1)
        for group in facts["groups"]:
            for key, family in stored.items():
                family.add_metric([name, *(group[label] for label in GROUP)], group[key])
    return [*stored.values(), info]
