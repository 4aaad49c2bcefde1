"""How busy the machine was with other things during a run, its heat and energy, where it tells.

Steal is time that the hypervisor gave to others; other load is CPU time of processes that are not
part of the run. Both count for the whole machine, from /proc/stat by psutil.
"""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from gblm.bench import heat

POWERCAP = Path("/sys/class/powercap")
BUSY = ("user", "nice", "system", "irq", "softirq")


@dataclass
class Meter:
    """What `measured` fills in at its end.

    Attributes:
        seconds: of wall time.
        steal: share of the machine's CPU time that was stolen.
        other: share of the machine's CPU time that processes outside the run used.
        joules: of what is measured; None where nothing is.
        energy_source: what measured it, or why nothing did.
        heat: of `gblm.bench.heat.evidence`.
    """

    seconds: float = 0.0
    steal: float = 0.0
    other: float = 0.0
    joules: float | None = None
    energy_source: str = ""
    heat: dict[str, Any] = field(default_factory=dict)

    def evidence(self) -> dict[str, Any]:
        """For the record."""
        return {
            "wall_seconds": self.seconds,
            "steal": round(self.steal, 4),
            "other_load": round(self.other, 4),
            "joules": self.joules,
            "energy_source": self.energy_source,
            **self.heat,
        }


@contextmanager
def measured(
    own: psutil.Process | None = None, rapl: Path = POWERCAP, cpus: Path = heat.CPUS
) -> Iterator[Meter]:
    """Measure what happens inside.

    Args:
        own: a process that lives throughout and is part of the run, with its children; ours, and
            those that end inside, are counted anyway.
        rapl: where Linux shows the energy counters.
        cpus: where it shows how often heat throttled them.
    """
    heat_before = heat.cpu_counters(cpus), heat.gpu_counters()
    meter, energy = Meter(), Energy(rapl)
    began, before, ours = time.monotonic(), psutil.cpu_times(), own_seconds(own)
    energy.start()
    try:
        yield meter
    finally:
        energy.stop()
        meter.seconds = time.monotonic() - began
        used = own_seconds(own) - ours
        meter.steal, meter.other = shares(before._asdict(), psutil.cpu_times()._asdict(), used)
        meter.joules, meter.energy_source = energy.joules, energy.source
        heat_after = heat.cpu_counters(cpus), heat.gpu_counters()
        meter.heat = heat.evidence(heat_before, heat_after)


def shares(
    before: Mapping[str, float], after: Mapping[str, float], own: float
) -> tuple[float, float]:
    """Steal and other load as shares of all CPU time between two readings.

    Args:
        before: seconds by state, summed over all CPUs, as psutil.cpu_times gives them.
        after: the same, later.
        own: seconds that the run itself used.
    """
    # Linux counts guests as user time, too.
    grown = {key: after[key] - before[key] for key in after if not key.startswith("guest")}
    total = sum(grown.values())
    if total <= 0:
        return 0.0, 0.0
    busy = sum(grown.get(key, 0.0) for key in BUSY)
    return grown.get("steal", 0.0) / total, max(0.0, busy - own) / total


def own_seconds(process: psutil.Process | None) -> float:
    """CPU seconds of this process, of its children that ended, and of a living one's tree."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    times = os.times()
    total = times.user + times.system + ended.ru_utime + ended.ru_stime
    if process is None:
        return total
    with contextlib.suppress(psutil.NoSuchProcess):
        for one in (process, *process.children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):
                spent = one.cpu_times()
                total += spent.user + spent.system + spent.children_user + spent.children_system
    return total


@dataclass
class Energy:
    """RAPL counters of the processor packages, or else the power that nvidia-smi reports."""

    rapl: Path = POWERCAP
    joules: float | None = None
    source: str = ""
    _before: dict[Path, int] = field(default_factory=dict)
    _watts: list[float] = field(default_factory=list)
    _done: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _began: float = 0.0

    def start(self) -> None:
        """Read the counters, or start to sample."""
        self._began = time.monotonic()
        if shutil.which("nvidia-smi"):
            self.source = "nvidia-smi power.draw, all GPUs, once a second"
            self._thread = threading.Thread(target=self._sample, daemon=True)
            self._thread.start()
            return
        self._before = _counters(self.rapl)
        self.source = (
            "RAPL, processor packages"
            if self._before
            else "not measured: no RAPL counter can be read and there is no nvidia-smi"
        )

    def stop(self) -> None:
        """Set `joules`."""
        if self._thread is not None:
            self._done.set()
            self._thread.join()
            if self._watts:
                mean = sum(self._watts) / len(self._watts)
                self.joules = mean * (time.monotonic() - self._began)
            else:
                self.source = "not measured: nvidia-smi tells no power"
            return
        after = _counters(self.rapl)
        if self._before and after.keys() == self._before.keys():
            grown = [_growth(path, self._before[path], after[path]) for path in after]
            self.joules = sum(grown) / 1e6

    def _sample(self) -> None:
        command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        while True:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            with contextlib.suppress(ValueError):
                self._watts.append(sum(map(float, done.stdout.split())))
            if self._done.wait(1.0):
                return


def _counters(folder: Path) -> dict[Path, int]:
    """Microjoules by package; cores and memory inside a package are part of it."""
    found = {}
    for path in sorted(folder.glob("intel-rapl:*")):
        if path.name.count(":") == 1:
            with contextlib.suppress(OSError, ValueError):
                found[path] = int((path / "energy_uj").read_text())
    return found


def _growth(path: Path, before: int, after: int) -> int:
    """Counters start again at zero after their range."""
    if after >= before:
        return after - before
    return after - before + int((path / "max_energy_range_uj").read_text())
