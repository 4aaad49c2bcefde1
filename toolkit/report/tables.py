"""The tables of a report: rows of text, the same on the page and in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gblm.report.axes import number
from gblm.report.facts import Facts, Quality, Score, Timed
from gblm.report.folders import LinearFacts, PackedFacts

QUALITY = ("model", "perplexity", "× dense", "MB", "bits per weight")
DRIFT = ("model", "beside", "mean", "p99", "max", "same top-1", "KL mean", "KL p99")
TIMED = ("call", "tokens", "µs", "× cuBLAS bf16", "of the read bandwidth")
CHECKS = ("model", "verdict", "value", "bound", "check")


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: above it.
        note: the protocol of its figures; "" where each row names its own.
        header: of the columns.
        rows: as many cells each.
    """

    title: str
    note: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(facts: Facts) -> Iterator[Table]:
    """Perplexity, drift and tasks by protocol; gates and validations; calls on GPUs."""
    for (protocol, _), rows in by_protocol(facts.quality).items():
        yield Table("Perplexity", protocol, QUALITY, tuple(map(_quality, rows)))
    for protocol in dict.fromkeys(one.protocol for one in facts.drifts):
        found = [
            (one.name, one.beside, *map(number, one.figures))
            for one in facts.drifts
            if one.protocol == protocol
        ]
        title = "Drift of log-probs in nats, KL(dense ‖ model) in nats"
        yield Table(title, protocol, DRIFT, tuple(found))
    for protocol in dict.fromkeys(one.protocol for one in facts.scores):
        own = [one for one in facts.scores if one.protocol == protocol]
        yield Table("Tasks ± standard error", protocol, *_scores(own))
    if facts.checks:
        # What is long stands last, so that a phone shows the verdict.
        checked = tuple((c.name, "pass" if c.passed else "FAIL", c.value, c.bound, c.what)
                        for c in facts.checks)  # fmt: skip
        yield Table("Gates and validations", "", CHECKS, checked)
    for title, note in dict.fromkeys((one.table, one.note) for one in facts.timed):
        calls = (one for one in facts.timed if (one.table, one.note) == (title, note))
        yield Table(title, note, TIMED, tuple(map(_timed, calls)))


def measured(facts: Facts) -> Iterator[Table]:
    """Every figure of speed, memory and energy, by load."""
    for setting in dict.fromkeys(one.setting for one in facts.measures):
        own = [one for one in facts.measures if one.setting == setting]
        labels = tuple(dict.fromkeys(label for one in own for label in one.figures))
        rows = tuple((one.name, *(number(one.figures.get(label)) for label in labels))
                     for one in own)  # fmt: skip
        yield Table("Measured, medians of the rounds", setting, ("model", *labels), rows)


def _quality(row: Quality) -> tuple[str, ...]:
    size = None if row.num_bytes is None else row.num_bytes / 1e6
    perplexity, ratio = (number(value, 4) for value in (row.perplexity, row.ratio))
    return (row.name, perplexity, ratio, number(size, 4), number(row.bits))


def _timed(one: Timed) -> tuple[str, ...]:
    share = "–" if one.share is None else f"{one.share:.0%}"
    return (one.name, str(one.tokens), number(one.microseconds, 4), number(one.ratio), share)


def _scores(own: Sequence[Score]) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    """Header and rows: a column for each model."""
    names = list(dict.fromkeys(one.name for one in own))
    cells = {(one.task, one.metric, one.name): _share(one) for one in own}
    rows = dict.fromkeys((one.task, one.metric) for one in own)
    return (
        ("task", "metric", *names),
        tuple((*row, *(cells.get((*row, name), "–") for name in names)) for row in rows),
    )


def _share(one: Score) -> str:
    error = "" if one.stderr is None else f" ± {one.stderr:.4f}"
    return f"{one.value:.4f}{error}"


def by_protocol(rows: Sequence[Quality]) -> dict[tuple[str, str], list[Quality]]:
    """Figures that may be compared, the best first."""
    found: dict[tuple[str, str], list[Quality]] = {}
    for row in rows:
        found.setdefault((row.protocol, row.text), []).append(row)
    return {key: sorted(own, key=lambda row: row.perplexity) for key, own in found.items()}


def overall(folder: PackedFacts) -> str:
    """Sparsity and bits of all of a folder's linears, as a range where they differ."""
    words = []
    for key, unit in (("sparsity", "of the weights not stored"), ("bits", "bits per weight")):
        values = [getattr(linear, key) for linear in folder.linears]
        low, high = number(min(values)), number(max(values))
        words.append(f"{low if low == high else f'{low} to {high}'} {unit}")
    return ", ".join(words)


def linear_rows(folder: PackedFacts) -> list[tuple[str, str, str, str, str, str]]:
    """Linears of one kind and treatment in a row: part, layers, pattern, values, bits, backend."""
    groups: dict[tuple[str, str, str, str], list[LinearFacts]] = {}
    for linear in folder.linears:
        key = (linear.part, linear.pattern, linear.values, linear.backend)
        groups.setdefault(key, []).append(linear)
    return [
        (part, spans([one.layer for one in own]), pattern, values,
         number(sum(one.bits for one in own) / len(own)), backend)
        for (part, pattern, values, backend), own in groups.items()
    ]  # fmt: skip


def spans(numbers: Sequence[int]) -> str:
    """1, 2, 3, 7 → "1–3, 7"."""
    found: list[list[int]] = []
    for n in sorted(numbers):
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in found)
