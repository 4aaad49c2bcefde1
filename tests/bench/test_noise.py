"""Other load and energy, from readings that are given and files as Linux shows them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from gblm.bench import noise
from gblm.bench.noise import Energy, measured, own_seconds, shares

BEFORE = {"user": 10.0, "nice": 0.0, "system": 5.0, "idle": 100.0, "iowait": 0.0, "irq": 0.0,
          "softirq": 0.0, "steal": 1.0, "guest": 3.0, "guest_nice": 0.0}  # fmt: skip


def test_shares_are_of_all_cpu_time() -> None:
    after = BEFORE | {"user": 16.0, "system": 6.0, "idle": 101.0, "steal": 3.0, "guest": 8.0}
    steal, other = shares(BEFORE, after, own=4.0)
    assert steal == pytest.approx(2 / 10)
    assert other == pytest.approx((6 + 1 - 4) / 10)


def test_rounding_of_our_own_time_is_no_negative_load() -> None:
    after = BEFORE | {"user": 11.0, "idle": 101.0}
    assert shares(BEFORE, after, own=1.5) == (0.0, 0.0)
    assert shares(BEFORE, BEFORE, own=0.0) == (0.0, 0.0)


SPIN = "import time\nwhile time.process_time() < 0.3: pass\n"


def test_children_count_as_ours_while_they_live_and_when_they_have_ended() -> None:
    before = own_seconds(None)
    subprocess.run([sys.executable, "-c", SPIN], check=True)
    assert own_seconds(None) - before >= 0.3
    waiting = f"{SPIN}print('spun', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", waiting], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        assert own_seconds(psutil.Process(child.pid)) - own_seconds(None) >= 0.25
        child.communicate(b"\n")


def counters(folder: Path, package: int, core: int) -> None:
    for name, value in {"intel-rapl:0": package, "intel-rapl:0:0": core}.items():
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "energy_uj").write_text(f"{value}\n")
        (folder / name / "max_energy_range_uj").write_text("1000000000\n")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(noise.shutil, "which", lambda _: None)


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("before", "after", "joules"), [(5, 2_000_005, 2.0), (999_000_000, 10, 1.00001)]
)
def test_packages_count_once_and_counters_may_wrap(
    tmp_path: Path, before: int, after: int, joules: float
) -> None:
    counters(tmp_path, before, 7)
    energy = Energy(tmp_path)
    energy.start()
    counters(tmp_path, after, 900)
    energy.stop()
    assert energy.joules == pytest.approx(joules)
    assert "RAPL" in energy.source


@pytest.mark.usefixtures("no_gpu")
def test_without_a_counter_the_reason_is_given(tmp_path: Path) -> None:
    with measured(rapl=tmp_path) as meter:
        pass
    found = meter.evidence()
    assert found["joules"] is None
    assert "no RAPL counter can be read" in found["energy_source"]
