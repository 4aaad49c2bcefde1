"""Gates: bounds on measured values, such as `ppl <= 1.10x`, from text to a verdict. Needs no torch.

gate   = value (<= | >=) number [unit]        value = name [ "(" argument ")" ]
x      times the baseline's; pt: percentage points more than the baseline's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gblm.errors import InputError, UsageError
from gblm.evaluate.speedups import speedup

GATE = re.compile(
    r"\s*(?P<name>[a-z0-9_]+)\s*(?:\(\s*(?P<argument>[^()\s]+)\s*\))?\s*(?P<op>[<>=]+)\s*"
    r"(?P<bound>[+-]?\d+(?:\.\d+)?)\s*(?P<unit>[a-zA-Z%]*)\s*"
)


@dataclass(frozen=True)
class Kind:
    """What a gate may say of one value.

    Attributes:
        op: "<=" where less is better, else ">=".
        units: of the bound; "" is the value itself.
        argument: what may stand in brackets; None: nothing.
        needed: whether it must.
    """

    op: str
    units: tuple[str, ...]
    argument: str | None = None
    needed: bool = False


KINDS = {
    "ppl": Kind("<=", ("", "x"), "text"),
    "kl": Kind("<=", ("",), "text"),
    "drift_mean": Kind("<=", ("",), "text"),
    "drift_p99": Kind("<=", ("",), "text"),
    "drift_max": Kind("<=", ("",), "text"),
    "top1": Kind(">=", ("",), "text"),
    "acc": Kind(">=", ("", "pt"), "task", needed=True),
    "acc_norm": Kind(">=", ("", "pt"), "task", needed=True),
    "decode": Kind(">=", ("x",), "row"),
}
DRIFT = {"kl": "kl_mean", "drift_mean": "mean", "drift_p99": "p99", "drift_max": "max",
         "top1": "top1"}  # fmt: skip


@dataclass(frozen=True)
class Gate:
    """One bound.

    Attributes:
        line: as it was written.
        name: a key of KINDS.
        argument: a text, task or row; None: all texts, or the only row.
        bound: in `unit`.
        unit: "", "x" or "pt".
    """

    line: str
    name: str
    argument: str | None
    bound: float
    unit: str

    @property
    def needs_baseline(self) -> bool:
        """Whether the value says something only beside the dense model."""
        return self.name in DRIFT or (self.unit != "" and self.name != "decode")


@dataclass(frozen=True)
class Verdict:
    """A gate beside what was measured.

    Attributes:
        gate: as it was written.
        of: the text, task or row that decided.
        value: in the gate's unit; NaN never passes.
        bound: the same.
        unit: "", "x" or "pt".
        passed: whether it holds.
    """

    gate: str
    of: str
    value: float
    bound: float
    unit: str
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """For records; NaN and infinity as None, which JSON has no numbers for."""
        return asdict(self) | {"value": self.value if math.isfinite(self.value) else None}


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
    if name not in KINDS:
        raise UsageError(f"gate {text!r}: {name} is unknown; choose from {', '.join(KINDS)}.")
    kind = KINDS[name]
    if found["op"] != kind.op:
        raise UsageError(f"gate {text!r}: {name} takes {kind.op}, not {found['op']}.")
    if unit not in kind.units:
        ways = " or ".join(f"1{unit}" for unit in kind.units)
        raise UsageError(f"gate {text!r}: the unit {unit!r} does not fit; write a bound as {ways}.")
    if kind.needed and argument is None:
        raise UsageError(f"gate {text!r}: name the {kind.argument}, as in {name}(arc_easy).")
    bound = float(found["bound"])
    if bound <= 0 and unit == "x":
        raise UsageError(f"gate {text!r}: a ratio must be above 0.")
    return Gate(text.strip(), name, argument, bound, unit)


def check_gates(
    gates: Sequence[Gate],
    texts: Sequence[str],
    tasks: Sequence[str],
    record: dict[str, Any] | None,
    model: str | None = None,
) -> None:
    """Refuse gates on what will not be measured, before anything is.

    Args:
        gates: parsed.
        texts: names of those that will be measured.
        tasks: the same.
        record: of `gblm bench`, if one is given.
        model: name of what will be measured; None if it is not known.

    Raises:
        UsageError: the text, the task or the record is missing.
        InputError: the record does not hold the figure.
    """
    for gate in gates:
        kind = KINDS[gate.name]
        if kind.argument == "task" and gate.argument not in tasks:
            raise UsageError(f"gate {gate.line!r}: {gate.argument} is not among --tasks.")
        if kind.argument == "text" and not texts:
            raise UsageError(f"gate {gate.line!r}: no text is measured; give --text.")
        if kind.argument == "text" and gate.argument not in (None, *texts):
            raise UsageError(
                f"gate {gate.line!r}: {gate.argument} is no text; measured are {', '.join(texts)}."
            )
        if kind.argument == "row":
            if record is None:
                raise UsageError(
                    f"gate {gate.line!r} needs a record of `gblm bench`: give --record."
                )
            _decode(gate, record, model)


def judge(
    gates: Sequence[Gate],
    result: dict[str, Any],
    record: dict[str, Any] | None = None,
    model: str | None = None,
) -> list[Verdict]:
    """Hold what was measured against the gates.

    Args:
        gates: parsed.
        result: of `gblm eval`: "texts" and "tasks".
        record: of `gblm bench`, if one is given.
        model: as `check_gates` takes it.

    Raises:
        InputError: a value is not there, because there is no baseline or the engine gives none.
    """
    return [_judge(gate, list(_values(gate, result, record, model))) for gate in gates]


def _judge(gate: Gate, values: Sequence[tuple[str, float | None]]) -> Verdict:
    """The worst of the values, by what each is of, beside the bound."""
    kind = KINDS[gate.name]
    missing = next((of for of, value in values if value is None), None)
    if missing is not None or not values:
        raise InputError(
            f"gate {gate.line!r}: {missing or gate.argument or 'the value'} has no such figure; it "
            "needs a dense --baseline, an engine that gives it, or another record."
        )
    found = [(of, float("nan") if value is None else value) for of, value in values]
    # The worst decides; NaN is worse than anything.
    sign = 1 if kind.op == "<=" else -1
    of, value = max(found, key=lambda pair: (math.isnan(pair[1]), sign * pair[1]))
    passed = value <= gate.bound if kind.op == "<=" else value >= gate.bound
    return Verdict(gate.line, of, value, gate.bound, gate.unit, passed)


def _values(
    gate: Gate, result: dict[str, Any], record: dict[str, Any] | None, model: str | None
) -> Iterator[tuple[str, float | None]]:
    kind = KINDS[gate.name]
    if kind.argument == "row":
        yield _decode(gate, record or {}, model)
    elif kind.argument == "task":
        row = result["tasks"]["results"].get(gate.argument, {}).get(gate.name, {})
        value, dense = row.get("value"), row.get("baseline")
        if gate.unit == "pt":
            value = None if value is None or dense is None else 100 * (value - dense)
        yield str(gate.argument), value
    else:
        for row in result["texts"]:
            if gate.argument in (None, row["text"]):
                yield row["text"], _of_text(gate, row)


def _of_text(gate: Gate, row: dict[str, Any]) -> float | None:
    if gate.name in DRIFT:
        drift = row.get("drift", {})
        # Over some tokens KL is too small, so that it could pass where the whole would not.
        partial = gate.name == "kl" and "kl_over" in drift
        found: float | None = None if partial else drift.get(DRIFT[gate.name])
        return found
    value: float | None = row.get("ratio" if gate.unit == "x" else "perplexity")
    return value


def _decode(gate: Gate, record: dict[str, Any], model: str | None) -> tuple[str, float]:
    try:
        return speedup(record, gate.argument, model)
    except InputError as error:
        raise InputError(f"gate {gate.line!r}: {error}.") from error
