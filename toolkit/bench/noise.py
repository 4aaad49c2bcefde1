"""What else the machine did during a run: stolen time, other processes, the speed of memory.

Steal is time that the hypervisor gave to others; other load is CPU time of processes that are not
part of the run. Both are shares of the whole machine's CPU time, from /proc/stat by psutil. Heat
and clock frequencies are not checked.
"""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil

from gblm.kernels import native

BUSY = ("user", "nice", "system", "irq", "softirq")
# Of a round, all as shares: the machine's CPU time that a hypervisor and other processes may take,
# and by how much memory may be slower than in the best rounds.
STEAL, OTHER_LOAD, SLOW_READ = 0.02, 0.10, 0.15


@contextmanager
def measured(own: Sequence[psutil.Process] = ()) -> Iterator[dict[str, float]]:
    """Measure the noise while the block runs.

    Args:
        own: processes that are part of the run, with their children; this process, and those that
            it starts and ends inside, are counted anyway.

    Yields:
        A dictionary that holds at the end "steal" and "other_load", shares.
    """
    found: dict[str, float] = {}
    before, ours = psutil.cpu_times()._asdict(), own_seconds(own)
    try:
        yield found
    finally:
        used = own_seconds(own) - ours
        steal, other = shares(before, psutil.cpu_times()._asdict(), used)
        found |= {"steal": steal, "other_load": other}


def reason(noise: Mapping[str, Any], best_read: float | None = None) -> str | None:
    """Say what speaks against a round, if anything does.

    Args:
        noise: as `measured` gives it, and "read_limit_gb_s" where that was measured.
        best_read: the read limit of the best rounds, GB/s; see `best`.
    """
    for key, limit, words in (
        ("steal", STEAL, "of the CPU time was stolen by the hypervisor"),
        ("other_load", OTHER_LOAD, "of the CPU time went to other processes"),
    ):
        share = noise.get(key, 0.0)
        if share > limit:
            return f"{share:.1%} {words} (at most {limit:.0%})"
    read = noise.get("read_limit_gb_s")
    if read and best_read and read < (1 - SLOW_READ) * best_read:
        return f"memory was read at {read:.1f} GB/s, {best_read:.1f} GB/s in the best rounds"
    return None


def best(reads: Sequence[float | None]) -> float | None:
    """Give the read limit that a quarter reaches; the single best may be a moment's burst."""
    ordered = sorted(read for read in reads if read is not None)
    return ordered[-((len(ordered) + 3) // 4)] if ordered else None


def judge(
    load: str, rounds: Sequence[Mapping[str, Mapping[str, Any]]], allow_noise: bool = False
) -> tuple[list[int], list[str], list[str]]:
    """Choose the rounds of a load in which the machine did nothing else.

    Args:
        load: for the sentences.
        rounds: what `measured` gave in each round by side, and "read_limit_gb_s".
        allow_noise: noisy rounds count, too.

    Returns:
        The numbers of the rounds that count, a note on each noisy one, and the reason why none
        counts where fewer than half were quiet.
    """
    limit = best([heard.get("read_limit_gb_s") for one in rounds for heard in one.values()])
    noisy = {}
    for number, one in enumerate(rounds):
        for side, heard in one.items():
            if why := reason(heard, limit):
                noisy[number] = f"{side}: {why}" if side else why
    fate = "is noisy" if allow_noise else "is left out"
    notes = [f"{load}: round {number + 1} {fate}: {why}." for number, why in noisy.items()]
    kept = [number for number in range(len(rounds)) if allow_noise or number not in noisy]
    if 2 * len(kept) >= len(rounds):
        return kept, notes, []
    words = f"only {len(kept)} of {len(rounds)} rounds were quiet; {next(iter(noisy.values()))}"
    return [], notes, [f"{load}: {words}"]


def unchecked(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say which check had nothing to look at in all that was heard."""
    if any(one.get("read_limit_gb_s") for one in every):
        return []
    return ["the speed of memory was not checked: the CPU kernels are not built."]


def shares(
    before: Mapping[str, float], after: Mapping[str, float], own: float
) -> tuple[float, float]:
    """Give steal and other load as shares of all CPU time between two readings.

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


def reader(clock: Callable[[], float], reads: int, size: int) -> Callable[[], float]:
    """Fill memory, and give what measures how fast PyTorch's threads read it now, in GB/s.

    The fastest read may have found part of it in a large cache, so the median counts.

    Args:
        clock: gives seconds.
        reads: how often it is read as a whole.
        size: of the memory in bytes.
    """
    memory = native.allocate(size).fill_(1)

    def read() -> float:
        seconds = []
        for _ in range(reads):
            began = clock()
            native.read_seconds(memory)
            seconds.append(clock() - began)
        return memory.nbytes / statistics.median(seconds) / 1e9

    return read


def own_seconds(processes: Sequence[psutil.Process]) -> float:
    """Sum the CPU seconds of this process, its children that ended, and the trees of others."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    times = os.times()
    total = times.user + times.system + ended.ru_utime + ended.ru_stime
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            for one in (process, *process.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    spent = one.cpu_times()
                    total += spent.user + spent.system + spent.children_user + spent.children_system
    return total
