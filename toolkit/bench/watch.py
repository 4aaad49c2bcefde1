"""Watch two live servers: read both /metrics again and again, compare what happened in between.

No request is sent to a model: the traffic is what the servers' users send.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from gblm.bench.compare import MIN_INTERVALS, compare
from gblm.bench.metrics import Growth, RestartError, Snapshot, Target
from gblm.errors import GblmError, MachineError, UsageError
from gblm.progress import Progress, no_progress
from gblm.provenance import provenance
from gblm.record import Record, Verdict


@dataclass(frozen=True)
class Window:
    """The window says for how long the servers are read, and how often, in seconds."""

    duration: float = 600.0
    interval: float = 10.0

    @property
    def intervals(self) -> int:
        """Count the intervals that fit in; what is left over is not watched."""
        return int(self.duration / self.interval + 1e-9)

    def check(self) -> None:
        """Refuse a window that no verdict can come from.

        Raises:
            UsageError: it holds too few intervals.
        """
        if self.intervals < MIN_INTERVALS:
            raise UsageError(
                f"--duration {self.duration:g} holds {self.intervals} intervals of "
                f"{self.interval:g} s; verdicts need at least {MIN_INTERVALS}."
            )


@dataclass(frozen=True)
class Reading:
    """A reading holds both servers at one time."""

    clock: str
    sides: tuple[Snapshot, Snapshot]


def watch(a: Target, b: Target, window: Window, progress: Progress = no_progress) -> Record:
    """Compare two live vLLM servers over a window.

    A reading that fails is left out: the interval then reaches to the next one that succeeds, so
    that a server too busy to answer does not lose its slowest minutes. An interval in which a
    server restarted counts for neither.

    Args:
        a: the server to compare with.
        b: the candidate.
        window: when they are read.
        progress: for a progress bar.

    Returns:
        The record; the rows and sentences are those of `compare`.

    Raises:
        UsageError: the window is too short, or both addresses are the same.
        MachineError: a server cannot be reached at the start, or no interval is valid.
        InputError: what it answers is not vLLM's metrics.
    """
    window.check()
    if a.url == b.url:
        raise UsageError(f"A and B are the same server: {a.url}.")
    problems: list[str] = []
    readings = _readings(a, b, window, problems, progress)
    every = _intervals(readings, problems)
    valid = [growth for growth in every if growth is not None]
    if not valid:
        raise MachineError(f"no interval of this window can be used: {'; '.join(problems)}.")
    rows, facts, sentences = compare(valid)
    sides = {name: {"url": at.url, **facts[name]} for name, at in (("A", a), ("B", b))}
    settings = {**asdict(window), "intervals": len(every), "valid": len(valid)}
    return Record(
        kind="watch",
        sides=sides,
        rows=tuple(rows),
        baseline="A",
        verdict=Verdict(True, notes=(*sentences, *problems)),
        provenance=provenance() | {"settings": settings},
    )


def _readings(
    a: Target, b: Target, window: Window, problems: list[str], progress: Progress
) -> list[Reading]:
    """Collect all readings that succeed; the first must."""
    readings: list[Reading] = []
    step = progress("readings", window.intervals + 1)
    with ThreadPoolExecutor(2) as pool:
        for _ in _ticks(window):
            clock = datetime.now(timezone.utc).isoformat(timespec="seconds")
            first, second = pool.map(_read, (a, b))
            if isinstance(first, Snapshot) and isinstance(second, Snapshot):
                readings.append(Reading(clock, (first, second)))
            errors = [answer for answer in (first, second) if isinstance(answer, GblmError)]
            if errors and not readings:
                raise errors[0]
            problems += [f"{clock}: {str(error).rstrip('.')}" for error in errors]
            step()
    return readings


def _ticks(window: Window) -> Iterator[None]:
    """Return at the time of each reading; one that is missed by a whole interval is skipped."""
    began = time.monotonic()
    for number in range(window.intervals + 1):
        wait = began + number * window.interval - time.monotonic()
        if wait > -window.interval or number == window.intervals:
            time.sleep(max(0.0, wait))
            yield


def _read(target: Target) -> Snapshot | GblmError:
    try:
        text = target.fetch()
    except GblmError as error:
        return error
    try:
        return Snapshot.parse(text, time.monotonic())
    except GblmError as error:
        return type(error)(f"server {target.name}, {target.url}: {error}")


def _intervals(readings: list[Reading], problems: list[str]) -> list[tuple[Growth, Growth] | None]:
    """Subtract neighbouring readings; None where a server restarted, which is a problem."""
    found: list[tuple[Growth, Growth] | None] = []
    for before, after in itertools.pairwise(readings):
        growth: list[Growth] = []
        for side, earlier, later in zip("AB", before.sides, after.sides, strict=True):
            try:
                growth.append(later.growth_since(earlier))
            except RestartError:
                problems.append(
                    f"{before.clock} to {after.clock}: server {side} restarted, or is "
                    "several behind one address; this interval does not count"
                )
        found.append((growth[0], growth[1]) if len(growth) == 2 else None)
    return found
