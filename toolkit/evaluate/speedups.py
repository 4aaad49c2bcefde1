"""How often faster than its baseline a model decodes, out of the records of `gblm bench`.

For gates. A record of another model, or a run that is not valid, gives no figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from gblm.errors import DAMAGE, InputError, damage

Record = dict[str, Any]
Speedup = tuple[str, float]


def speedup(record: Record, row: str | None, model: str | None) -> Speedup:
    """The figure that decides: of several loads the lowest.

    Args:
        record: of a kind of READERS.
        row: the name of a model or side; None where the record leaves no choice.
        model: what is evaluated, which must be what the record measured if no row is named; None
            if its name is not known.

    Returns:
        What it is of, and times the baseline's tokens per second.

    Raises:
        InputError: the record is of another kind or model, is damaged, or its run is not valid.
    """
    kind = str(record.get("kind"))[:40]
    if kind not in READERS:
        raise InputError(
            f"the record's kind is {kind!r}; give one of `gblm bench serving`, `bench models` or "
            "`bench onnx`"
        )
    try:
        of, value = READERS[kind](record, row, model)
        if not math.isfinite(value):
            raise ValueError(f"{of} is {value}")
        return of, float(value)
    except DAMAGE as error:
        raise InputError(
            f"the record is none of kind {kind!r} as gblm writes it: {damage(error)}"
        ) from error


def _serving(record: Record, row: str | None, model: str | None) -> Speedup:
    measured = record["model"]
    if (row or model) not in (None, measured):
        raise InputError(f"the record measured {measured!r}, not {row or model!r}")
    return "decode_tok_s", record["summary"]["decode_tok_s"]["ratio"]


def _models(record: Record, row: str | None, model: str | None) -> Speedup:
    base = record["baseline"]
    known = {side["name"]: side["model"] for side in record["sides"] if side["name"] != base}
    names = [n for n, folder in known.items() if (n == row if row else model in (None, folder))]
    name = _only(names, list(known))
    rows = [one for one in record["rows"] if one["side"] == name]
    if not rows or not all(one["valid"] is True and "ratio" in one for one in rows):
        raise InputError(f"the run of {name} or of its baseline is INVALID, so no figure stands")
    if not all("tpot_ms_p50" in one["ratio"] for one in rows):
        raise InputError(f"--with {record['settings']['tool']} tells no time per token")
    # The ratio is of times, where half is twice as fast.
    found = [(one["load"], 1 / one["ratio"]["tpot_ms_p50"]["median"]) for one in rows]
    load, value = min(found, key=lambda pair: pair[1])
    said = ", ".join(f"{key} {number}" for key, number in load.items() if number is not None)
    return ", ".join(filter(None, (name, said))), value


def _onnx(record: Record, row: str | None, model: str | None) -> Speedup:
    first, *others = record["rows"]
    known = {one["name"]: one for one in others}
    name = _only([name for name in known if row in (None, name)], list(known))
    return name, known[name]["decode_speedup"][first["name"]]["median"]


def _only(found: list[str], known: list[str]) -> str:
    if len(found) != 1:
        raise InputError(f"name one row, as in decode(NAME): {', '.join(known)}")
    return found[0]


READERS: dict[str, Callable[[Record, str | None, str | None], Speedup]] = {
    "bench serving": _serving,
    "bench models": _models,
    "onnx": _onnx,
}
