"""Heat: counters as Linux and nvidia-smi show them, their growth, and what a run is worth then."""

from __future__ import annotations

from pathlib import Path

import pytest

from gblm.bench import heat
from gblm.bench.noise import measured


def count(folder: Path, core: int, package: str) -> Path:
    for cpu in ("cpu0", "cpu11"):
        place = folder / cpu / "thermal_throttle"
        place.mkdir(parents=True, exist_ok=True)
        (place / "core_throttle_count").write_text(f"{core}\n")
        (place / "package_throttle_count").write_text(f"{package}\n")
        (place / "core_throttle_max_time_ms").write_text("900\n")
    return folder


def test_the_counter_that_grew_most_counts_and_an_unreadable_one_does_not(tmp_path: Path) -> None:
    before = heat.cpu_counters(count(tmp_path, 3, "7"))
    assert before == {f"{cpu}/{kind}_throttle_count": number for cpu in ("cpu0", "cpu11")
                      for kind, number in (("core", 3), ("package", 7))}  # fmt: skip
    after = heat.cpu_counters(count(tmp_path, 4, "12"))
    assert heat.evidence((before, {}), (after, {}))["cpu_throttles"] == 5
    lost = heat.cpu_counters(count(tmp_path, 5, "?"))
    assert heat.evidence((before, {}), (lost, {}))["cpu_throttles"] == 2


def test_a_run_has_the_growth_as_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heat.shutil, "which", lambda _: None)
    with measured(cpus=count(tmp_path, 3, "7")) as meter:
        count(tmp_path, 4, "7")
    found = meter.evidence()
    assert (found["cpu_throttles"], found["gpu_throttle_s"]) == (1, None)
    assert found["heat_source"] == "the kernel's thermal_throttle counters"
    with measured(cpus=tmp_path / "none") as meter:
        pass
    assert meter.evidence()["cpu_throttles"] is None
    assert meter.evidence()["heat_source"].startswith("not checked")


@pytest.mark.parametrize(
    ("says", "found"),
    [
        ("echo 5, 70; echo 0, 1", {"GPU 0/sw_thermal_slowdown": 5, "GPU 0/hw_thermal_slowdown": 70,
                                   "GPU 1/sw_thermal_slowdown": 0, "GPU 1/hw_thermal_slowdown": 1}),
        ("echo '[N/A], [N/A]'", {}),
        ("echo 'Field \"x\" is not a valid field to query.'; exit 2", {}),
    ],
)  # fmt: skip
def test_the_driver_is_asked_and_may_know_nothing(
    says: str, found: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{says}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert heat.gpu_counters() == found


def test_time_of_gpus_is_in_seconds() -> None:
    found = heat.evidence(({}, {"GPU 0/x": 5}), ({}, {"GPU 0/x": 2_000_005}))
    assert (found["cpu_throttles"], found["gpu_throttle_s"]) == (None, 2.0)
    assert found["heat_source"] == "nvidia-smi's clocks_event_reasons"
