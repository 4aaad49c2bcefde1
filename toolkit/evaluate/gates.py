"""Gates: bounds on figures of records, such as `ppl <= 1.10x`, from text to outcome.

gate   = value (<= | >=) number [unit]        value = name [ "(" argument ")" ]
x      times the baseline's; pt: percentage points more than the baseline's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gblm.errors import InputError, UsageError
from gblm.record import Record

GATE = re.compile(
    r"\s*(?P<name>[a-z0-9_]+)\s*(?:\(\s*(?P<argument>[^()\s]+)\s*\))?\s*(?P<op>[<>=]+)\s*"
    r"(?P<bound>[+-]?\d+(?:\.\d+)?)\s*(?P<unit>[a-zA-Z%]*)\s*"
)


@dataclass(frozen=True)
class Bounded:
    """This says what a gate may demand of one metric of a record.

    `op` is "<=" where less is better, else ">="; of the `units` of a bound "" is the figure itself.
    A text or a task may stand in brackets; a task must.
    """

    metric: str
    op: str
    units: tuple[str, ...]
    argument: str


BOUNDED = {
    "ppl": Bounded("perplexity", "<=", ("", "x"), "text"),
    "kl": Bounded("kl_mean", "<=", ("",), "text"),
    "drift_mean": Bounded("drift_mean", "<=", ("",), "text"),
    "top1": Bounded("top1", ">=", ("",), "text"),
    "acc": Bounded("acc", ">=", ("", "pt"), "task"),
    "acc_norm": Bounded("acc_norm", ">=", ("", "pt"), "task"),
}
OF_BOTH = ("kl", "drift_mean", "top1")


@dataclass(frozen=True)
class Gate:
    """A gate is one bound: the line as it was written, and its parts.

    The argument is a text or task; None stands for all texts.
    """

    line: str
    name: str
    argument: str | None
    bound: float
    unit: str

    @property
    def needs_baseline(self) -> bool:
        """Tell whether the figure says something only beside the dense model."""
        return self.name in OF_BOTH or self.unit != ""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a gate is the value, in its unit, of the load that decided."""

    gate: Gate
    of: str
    value: float
    passed: bool

    def sentence(self) -> str:
        """Say it in one line."""
        word = "passed" if self.passed else "failed"
        return f"gate {word}: {self.gate.line}: {self.value:.4f}{self.gate.unit}, {self.of}"


def parse_gate(text: str) -> Gate:
    """Read a gate.

    Raises:
        UsageError: it is none.
    """
    found = GATE.fullmatch(text)
    if not found:
        raise UsageError(
            f"gate {text!r} is none: write VALUE <= NUMBER or VALUE >= NUMBER, such as "
            "'ppl <= 1.10x' or 'acc_norm(arc_easy) >= -1pt'."
        )
    name, argument, unit = found["name"], found["argument"], found["unit"]
    if name not in BOUNDED:
        raise UsageError(f"gate {text!r}: {name} is unknown; choose from {', '.join(BOUNDED)}.")
    known = BOUNDED[name]
    if found["op"] != known.op:
        raise UsageError(f"gate {text!r}: {name} takes {known.op}, not {found['op']}.")
    if unit not in known.units:
        ways = " or ".join(f"1{unit}" for unit in known.units)
        raise UsageError(f"gate {text!r}: the unit {unit!r} does not fit; write a bound as {ways}.")
    if known.argument == "task" and argument is None:
        raise UsageError(f"gate {text!r}: name the task, as in {name}(arc_easy).")
    bound = float(found["bound"])
    if bound <= 0 and unit == "x":
        raise UsageError(f"gate {text!r}: a ratio must be above 0.")
    return Gate(text.strip(), name, argument, bound, unit)


def check_gates(gates: Sequence[Gate], texts: Sequence[str], tasks: Sequence[str]) -> None:
    """Refuse gates on what will not be measured, before anything is.

    Raises:
        UsageError: the text or the task is missing.
    """
    for gate in gates:
        kind = BOUNDED[gate.name].argument
        if kind == "task" and gate.argument not in tasks:
            raise UsageError(f"gate {gate.line!r}: {gate.argument} is not among --tasks.")
        if kind == "text" and not texts:
            raise UsageError(f"gate {gate.line!r}: no text is measured; give --text.")
        if kind == "text" and gate.argument not in (None, *texts):
            raise UsageError(
                f"gate {gate.line!r}: {gate.argument} is no text; measured are {', '.join(texts)}."
            )


def judge(gates: Sequence[Gate], quality: Record) -> list[Outcome]:
    """Hold what `gblm eval` measured against the gates; of several figures the worst decides.

    Raises:
        InputError: a figure is not there, because there is no baseline or the engine gives none.
    """
    return [_judge(gate, list(_figures(gate, quality))) for gate in gates]


def _judge(gate: Gate, found: Sequence[tuple[str, float]]) -> Outcome:
    if not found:
        raise InputError(
            f"gate {gate.line!r}: {gate.argument or 'the value'} has no such figure; it needs a "
            "dense --baseline, an engine that gives it, or another record."
        )
    at_most = BOUNDED[gate.name].op == "<="
    # The worst decides; NaN is worse than anything.
    sign = 1 if at_most else -1
    of, value = max(found, key=lambda pair: (math.isnan(pair[1]), sign * pair[1]))
    passed = value <= gate.bound if at_most else value >= gate.bound
    return Outcome(gate, of, value, passed)


def _figures(gate: Gate, quality: Record) -> Iterator[tuple[str, float]]:
    """The model's figures by load, in the gate's unit; those without a baseline are missing."""
    metric, model = BOUNDED[gate.name].metric, next(iter(quality.sides))
    for row in quality.rows:
        ours = (row.side, row.metric) == (model, metric)
        if not ours or not (gate.argument is None or row.load.startswith(f"{gate.argument},")):
            continue
        value = math.nan if row.value is None else row.value
        if gate.unit:
            dense = quality.value(quality.baseline or "", row.load, metric)
            if dense is None:
                continue
            dense = dense if math.isfinite(dense) else math.nan
            # Rounded, so that one answer of a hundred is a point and no more.
            value = round(100 * (value - dense), 9) if gate.unit == "pt" else value / dense
        yield row.load.partition(",")[0], value
