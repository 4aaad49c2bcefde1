"""`gblm bench A [B …]`: all sides under all loads, round after round, and the record of that.

Figures of one round pair up, so that what disturbs the machine disturbs all sides alike. A load
that lost CPU time to others runs again; a round that stays noisy for one side is left out for all.
A side that did other work than was asked gets no figure: a figure without evidence is not printed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

import torch

from gblm.bench import noise
from gblm.bench.requests import Load, Request, Seen, metrics_of, unit_of
from gblm.bench.sides import Side
from gblm.kernels import native
from gblm.progress import Progress, no_progress
from gblm.provenance import provenance
from gblm.record import Record, Row, Verdict

logger = logging.getLogger(__name__)
READ_BYTES, READS = 1 << 28, 10
# Below this share of the concurrency asked for, the load was another one.
CONCURRENCY = 0.7
# More prompt tokens than this share from the prefix cache make first tokens look too fast.
CACHED = 0.01
# Threads of a side that has just worked spin for a moment, which slows the read. What slows it on a
# shared host passes within seconds, mostly: so often it is waited for.
SETTLE_SECONDS, PATIENCE = 1.0, 20
# Time is stolen in spells, too. With many sides hardly a round would be quiet at the first try.
TRIES = 3
# What one side did under one load in each round, or what all did in one round by name.
Round = dict[str, Seen]


def bench(sides: Sequence[Side], progress: Progress = no_progress) -> Record:
    """Measure all sides of one setup in turn; the first one is the baseline of all ratios.

    Args:
        sides: of `parse_sides`; the first has every load, others may have fewer.
        progress: for a progress bar.

    Raises:
        MachineError: an engine or a load generator failed.
    """
    origin, setup = provenance(), sides[0].setup
    step = progress("rounds", setup.rounds * sum(len(side.setup.loads) for side in sides))
    found: dict[Load, list[Round]] = {load: [] for load in setup.loads}
    read_limit = reader(setup.threads, 1 if setup.allow_noise else PATIENCE)
    with ExitStack() as stack:
        if not setup.restart:
            for side in sides:
                stack.enter_context(started(side))
        for number in range(setup.rounds):
            seen = one_round(order(sides, number), read_limit, step)
            for load, by_side in seen.items():
                found[load].append(by_side)
    return record_of(sides, found, origin)


@contextmanager
def started(side: Side) -> Iterator[Side]:
    """Start a side, and stop it at the end of the block."""
    logger.info("%s starts", side.name)
    side.start()
    try:
        yield side
    finally:
        side.stop()


def order(sides: Sequence[Side], number: int) -> list[Side]:
    """Turn and reverse the sides from round to round, so that drift hits all alike."""
    shift = number // 2 % len(sides)
    turned = [*sides[shift:], *sides[:shift]]
    return turned[::-1] if number % 2 else turned


def one_round(
    sides: Sequence[Side], read_limit: Callable[[], float | None], step: Callable[[], None]
) -> dict[Load, Round]:
    """Put every load on every side once; loads on the outside where all sides run already."""
    loads = max((side.setup.loads for side in sides), key=len)
    found: dict[Load, Round] = {load: {} for load in loads}

    def put(side: Side, load: Load) -> None:
        most = 1 if side.setup.allow_noise else TRIES
        for tries in range(1, most + 1):
            limit = read_limit()
            with noise.measured([side.process]) as heard:
                seen = side.load(load)
            seen.noise = heard | {"read_limit_gb_s": limit, "tries": tries}
            why = noise.reason(heard)
            if why is None:
                break
            logger.info("%s, %s, try %d of %d: %s", side.name, load.words, tries, most, why)
        found[load][side.name] = seen
        step()

    if sides[0].setup.restart:
        for side in sides:
            with started(side):
                for load in side.setup.loads:
                    put(side, load)
    else:
        for load in loads:
            for side in (side for side in sides if load in side.setup.loads):
                put(side, load)
    return found


def reader(threads: int | None, patience: int = PATIENCE) -> Callable[[], float | None]:
    """Give what measures how fast so many threads read memory now, in GB/s; None without kernels.

    The threads are those of the sides: two CPUs of a virtual machine may lie on one core or on two,
    which changes what two threads read, but not what a side with one thread does. While memory is
    slower than it was before, see `noise.best`, it is read again, so many times at most.
    """
    if native.refusal():
        return lambda: None
    now = noise.reader(time.perf_counter, READS, READ_BYTES)
    told: list[float] = []

    def settled() -> float:
        limit, before = 0.0, torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            for _ in range(patience):
                time.sleep(SETTLE_SECONDS)
                limit = now()
                if not noise.reason({"read_limit_gb_s": limit}, noise.best([*told, limit])):
                    break
        finally:
            torch.set_num_threads(before)
        told.append(limit)
        return limit

    return settled


def record_of(
    sides: Sequence[Side], found: dict[Load, list[Round]], origin: dict[str, Any]
) -> Record:
    """Judge all rounds and make the record."""
    setup = sides[0].setup
    rows: list[Row] = []
    reasons: list[str] = []
    notes = caveats(sides, found)
    for load, rounds in found.items():
        good, why, left_out = rows_of(load, rounds, setup.allow_noise)
        rows += good
        reasons += why
        notes += left_out
    settings = {key: value for key, value in asdict(setup).items() if key not in ("loads", "log")}
    return Record(
        kind="bench",
        sides={side.name: side.facts() for side in sides},
        rows=tuple(rows),
        baseline=sides[0].name,
        verdict=Verdict(not reasons, tuple(reasons), tuple(notes)),
        provenance=origin | {"settings": settings},
    )


def rows_of(
    load: Load, rounds: Sequence[Round], allow_noise: bool = False
) -> tuple[list[Row], list[str], list[str]]:
    """Judge one load.

    Args:
        load: what was asked.
        rounds: what was seen, by the names of the sides, which are the same in all rounds.
        allow_noise: noisy rounds count, too.

    Returns:
        The rows that stand, the reasons why others don't, and notes on noisy rounds.
    """
    flaws = _flaws(load, rounds)
    reasons = [f"{side}, {load.words}, {why}" for side, all_ in flaws.items() for why in all_]
    heard = [{side: seen.noise for side, seen in one.items()} for one in rounds]
    kept, notes, noisy = noise.judge(load.words, heard, allow_noise)
    rows = []
    for side in rounds[0] if kept else ():
        if side not in flaws:
            metrics = [metrics_of(rounds[number][side]) for number in kept]
            rows += [
                Row.of_rounds(side, load.words, name, unit_of(name), [m[name] for m in metrics])
                for name in metrics[0]
                if all(name in m for m in metrics)
            ]
    return rows, reasons + noisy, notes


def caveats(sides: Sequence[Side], found: dict[Load, list[Round]]) -> list[str]:
    """Say what makes the figures less than they look, though they stand."""
    notes, setup = [], sides[0].setup
    engines = {side.engine for side in sides}
    if "vllm" in engines and len(engines) > 1:
        notes.append(
            "vllm is measured through its server; the other engines in their process, with other "
            "random prompts of about the same lengths: ratios hold HTTP and scheduling, too."
        )
    fewest = min(load.num_prompts for load in setup.loads)
    if fewest < 100:
        notes.append(f"p99 of {fewest} requests is all but their slowest: raise --num-prompts.")
    if setup.rounds < 6 and len(sides) > 1:
        notes.append(
            f"the interval of {setup.rounds} rounds is their range: raise --rounds to 6 or more."
        )
    heard = [seen.noise for rounds in found.values() for one in rounds for seen in one.values()]
    if again := sum(one.get("tries", 1) - 1 for one in heard):
        notes.append(f"{again} of {len(heard) + again} runs of a load were noisy and made again.")
    return notes + noise.unchecked(heard)


def _flaws(load: Load, rounds: Sequence[Round]) -> dict[str, list[str]]:
    """Collect what speaks against each side's work; what differs between sides counts for all."""
    found: dict[str, list[str]] = {}
    for number, one in enumerate(rounds):
        alike = check_alike(one)
        for side, seen in one.items():
            for why in (*check_work(load, seen), *alike):
                found.setdefault(side, []).append(f"round {number + 1}: {why}")
    return found


def check_work(load: Load, seen: Seen) -> list[str]:
    """Say what is wrong with the work of one side by itself."""
    done = len(seen.requests)
    if seen.failed or done != load.num_prompts:
        return [f"{done} of {load.num_prompts} requests succeeded"]
    return [
        *_lengths(load, seen.requests),
        *_concurrency(load, seen),
        *_server(seen),
    ]


def check_alike(sides: Mapping[str, Seen]) -> list[str]:
    """Say what is wrong between the sides of one round: they must have had equal work."""
    reasons = []
    generators: dict[str, dict[str, Seen]] = {}
    for side, seen in sides.items():
        generators.setdefault(seen.prompts.partition(":")[0], {})[side] = seen
    for own in generators.values():
        reasons += _different("prompts", {side: seen.prompts for side, seen in own.items()})
        inputs = {side: [r.input_len for r in seen.requests] for side, seen in own.items()}
        reasons += _different("prompt lengths", inputs)
    outputs = {side: [r.output_len for r in seen.requests] for side, seen in sides.items()}
    return reasons + _different("output lengths", outputs)


def _lengths(load: Load, requests: Sequence[Request]) -> Iterable[str]:
    wrong = [r.output_len for r in requests if r.output_len != load.output_len]
    if wrong:
        yield (
            f"{len(wrong)} of {len(requests)} answers have another length than the "
            f"{load.output_len} tokens asked for, such as {wrong[0]}"
        )


def _concurrency(load: Load, seen: Seen) -> Iterable[str]:
    if not seen.requests:
        return
    wanted = min(load.concurrency, load.num_prompts)
    mean = sum(r.latency for r in seen.requests) / seen.seconds
    if mean < CONCURRENCY * wanted:
        yield (
            f"{wanted} requests in flight were asked for, on average there were {mean:.2f}; raise "
            "--num-prompts"
        )


def _server(seen: Seen) -> Iterable[str]:
    if seen.preemptions:
        yield (
            f"{seen.preemptions:.0f} preemptions: the key-value cache is too small for this load"
        )
    if seen.cached is not None and seen.cached > CACHED:
        yield f"{seen.cached:.0%} of the prompt tokens came from the prefix cache"


def _different(what: str, values: Mapping[str, Any]) -> list[str]:
    """Name the first side and one that differs; sides that do not tell do not count."""
    told = [(side, value) for side, value in values.items() if value]
    for side, value in told[1:]:
        if value != told[0][1]:
            return [f"{told[0][0]} and {side} had different {what}"]
    return []
