"""What a report takes from `gblm doctor --gpu-check`: times beside cuBLAS, lines, what failed."""

from __future__ import annotations

from gblm.report.axes import number
from gblm.report.facts import Check, Facts, Record, Timed, device, finite, maybe, words

STATES = ("met", "missed", "not measured")
NO_GRAPH = " *"


def gpu_check(record: Record) -> Facts:
    """Times of every linear and of the decode loop; lines as checks, or as notes where unmeasured.

    Raises:
        KeyError, TypeError, ValueError: the record is damaged.
    """
    where, sections = device(record), record["sections"]
    facts = Facts(timed=[*_linears(sections["times"]["rows"], where),
                         *_decoding(sections["decode"]["rows"], where)])  # fmt: skip
    for line in record["lines"]:
        name, state = words(line["line"]), STATES[STATES.index(line["state"])]
        if state == "not measured":
            facts.notes.append(f"{where}: {name}: not measured")
            continue
        bound, value = number(finite(line["bound"])), number(finite(line["value"]))
        sign = "≤" if line["at_most"] else "≥"
        facts.checks.append(Check(where, name, value, f"{sign} {bound}", state == "met"))
    for section, own in sections.items():
        facts.notes += [
            f"{where}: {words(section)} failed: {words(text)}" for text in own["failed"]
        ]
        if own["skipped"]:
            facts.notes.append(f"{where}: {words(section)}: {len(own['skipped'])} skipped")
    return facts


def _linears(rows: list[Record], where: str) -> list[Timed]:
    note = f"weights out of caches;{NO_GRAPH} without a CUDA graph; {where}"
    return [
        Timed(
            f"{words(row['label'])}, {'×'.join(str(int(finite(n))) for n in row['shape'])}", note,
            _name(row), int(finite(row["tokens"])), finite(row["us"]), maybe(row, "x_cublas"),
            maybe(row, "share_of_read"),
        )
        for row in rows
    ]  # fmt: skip


def _decoding(rows: list[Record], where: str) -> list[Timed]:
    note = f"a step of all layers in PyTorch, a token for each sequence; {where}"
    return [
        Timed("Decode loop", note, _name(row), int(finite(row["batch"])), 1e3 * finite(row["ms"]),
              maybe(row, "x_dense"), None)
        for row in rows
    ]  # fmt: skip


def _name(row: Record) -> str:
    name = f"{words(row['contender'])} {words(row['spec'])}".strip()
    return name if row["captured"] is True else name + NO_GRAPH
