"""Watch two live servers: read both /metrics again and again, compare what happened in between.

No request is sent to a model: the traffic is what the servers' users send.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from gblm.bench.compare import MIN_INTERVALS, compare
from gblm.bench.metrics import Growth, Snapshot, Target
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
    pairs, problems, count = _readings(a, b, window, progress)
    if not pairs:
        raise MachineError(f"no interval of this window can be used: {'; '.join(problems)}.")
    rows, facts, sentences = compare(pairs)
    return Record(
        kind="watch",
        sides={name: {"url": at.url, **facts[name]} for name, at in (("A", a), ("B", b))},
        rows=tuple(rows),
        baseline="A",
        verdict=Verdict(True, notes=(*sentences, *problems)),
        provenance=provenance()
        | {"settings": {**asdict(window), "intervals": count, "valid": len(pairs)}},
    )


def _readings(
    a: Target, b: Target, window: Window, progress: Progress
) -> tuple[list[tuple[Growth, Growth]], list[str], int]:
    """Read both servers all the time.

    Returns:
        What happened in each valid interval; sentences on what went wrong; how many intervals there
        were. An interval ends with a reading that succeeds; the first one must.
    """
    pairs: list[tuple[Growth, Growth]] = []
    problems: list[str] = []
    count, last = 0, None
    step = progress("readings", window.intervals + 1)
    with ThreadPoolExecutor(2) as pool:
        for _ in _ticks(window):
            clock = datetime.now(timezone.utc).isoformat(timespec="seconds")
            now = list(pool.map(_read, (a, b)))
            errors = [answer for answer in now if isinstance(answer, GblmError)]
            if errors and last is None:
                raise errors[0]
            problems += [f"{clock}: {str(error).rstrip('.')}" for error in errors]
            first, second = now
            if isinstance(first, Snapshot) and isinstance(second, Snapshot):
                if last is not None:
                    count += 1
                    grown = (first.growth_since(last[0]), second.growth_since(last[1]))
                    problems += _restarts(clock, grown)
                    if grown[0] is not None and grown[1] is not None:
                        pairs.append((grown[0], grown[1]))
                last = (first, second)
            step()
    return pairs, problems, count


def _restarts(clock: str, grown: Sequence[Growth | None]) -> list[str]:
    return [
        f"before {clock}: server {side} restarted, or is several behind one address; this interval "
        "does not count"
        for side, growth in zip("AB", grown, strict=True)
        if growth is None
    ]


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
