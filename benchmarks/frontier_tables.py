"""The tables of quality per byte, from the record of frontier.py."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frontier_cases import CASES, SEQ_LEN, Case
from frontier_record import RECORD, key_of, read
from pages import origin, table

Run = dict[str, Any]
# Rows of the README, at its calibration size; dense and sparse ones of about the same bytes.
SHOWN = (
    "dense", "int8", "sparsegpt-24", "alps-24-rec", "int4-rtn", "int4-gptq", "int3-gptq",
    "int3-gptq-rec", "int4-3.1-rec", "int4-3.1-spread-rec", "int2-g32-rec", "int4-2.6-rec",
    "int4-2.6-spread-rec",
)  # fmt: skip
SHOWN_SAMPLES = 64
PROTOCOLS = {"8w": "WikiText-2, 8w", "16w": "16w", "pydoc 8w": "pydoc, 8w", "full": "all of test"}


@dataclass(frozen=True)
class Row:
    """All seeds of a case at one calibration size.

    Attributes:
        name: of the case.
        samples: of the calibration; 0 without.
        runs: one per seed.
    """

    name: str
    samples: int
    runs: tuple[Run, ...]

    @property
    def case(self) -> Case:
        """What it is."""
        return CASES[self.name]

    @property
    def bits(self) -> float:
        """Per pruned weight, mean over seeds."""
        return statistics.mean(run["bits_per_weight"] for run in self.runs)

    def perplexity(self, protocol: str) -> tuple[float, float] | None:
        """Mean and standard deviation over seeds; None where no run has it."""
        return spread(r["perplexity"][protocol] for r in self.runs if protocol in r["perplexity"])

    @property
    def cpu_minutes(self) -> float | None:
        """Of prune(), mean over the runs without an accelerator."""
        found = [run["cpu_seconds"] for run in self.runs if run["device"] == "cpu"
                 and "cpu_seconds" in run]  # fmt: skip
        return statistics.mean(found) / 60 if found else None


def spread(values: Iterable[float]) -> tuple[float, float] | None:
    """Mean and standard deviation; that of one value is 0."""
    found = list(values)
    if not found:
        return None
    return statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0


def rows_of(record: dict[str, Any]) -> list[Row]:
    """The record by case and calibration size, most bits first.

    Raises:
        ValueError: perplexities are of different texts.
    """
    if len({str(run["tokens_sha256"]) for run in record["runs"]}) > 1:
        raise ValueError("the runs of frontier.json were measured on different texts.")
    alike: dict[tuple[str, int], list[Run]] = {}
    for run in record["runs"]:
        alike.setdefault(key_of(run)[:2], []).append(run)
    rows = [Row(name, samples, tuple(runs)) for (name, samples), runs in alike.items()]
    return sorted(rows, key=lambda row: -round(row.bits, 2))


def frontier(path: Path = RECORD) -> str:
    """The README's table and picture."""
    if not path.exists():
        return "Nothing has been recorded yet."
    rows = [row for row in rows_of(read(path))
            if row.name in SHOWN and row.samples in (0, SHOWN_SAMPLES)]  # fmt: skip
    picture = "![Perplexity against bits per weight and decode time](docs/frontier.svg)"
    return f"{perplexities(rows)}\n\n{picture}\n\n{notes(rows)}"


def frontier_all(path: Path = RECORD) -> str:
    """Every case at every calibration size."""
    if not path.exists():
        return "Nothing has been recorded yet."
    rows = rows_of(read(path))
    return f"{perplexities(rows)}\n\n{notes(rows)}"


def perplexities(rows: list[Row]) -> str:
    """A line per row; protocols that no row has are left out."""
    protocols = tuple(p for p in PROTOCOLS if any(row.perplexity(p) for row in rows))
    header = ["SmolLM2-135M", "bits/weight", "samples", "seeds",
              *(PROTOCOLS[protocol] for protocol in protocols), "CPU minutes"]  # fmt: skip
    lines = []
    for row in rows:
        calibrated = [str(row.samples), str(len(row.runs))] if row.samples else ["–", "–"]
        minutes = row.cpu_minutes
        lines.append([
            row.case.label,
            f"{row.bits:.2f}",
            *calibrated,
            *(figure(row.perplexity(protocol)) for protocol in protocols),
            "–" if minutes is None else f"{minutes:.1f}",
        ])  # fmt: skip
    return table(header, lines)


def figure(found: tuple[float, float] | None) -> str:
    """A mean with its spread, if there is one."""
    if found is None:
        return "–"
    mean, deviation = found
    digits = 1 if mean < 1000 else 0
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if deviation else "")


def notes(rows: list[Row]) -> str:
    """What the columns mean, and where the runs were made."""
    runs = [run for row in rows for run in row.runs]
    return (
        "Perplexity, float32, of windows of 512 tokens: 8w and 16w are the first 8 and 16 of "
        f"WikiText-2 test; pydoc is another domain. {calibration(rows)}Bits of a pruned weight "
        "count masks, row offsets and scales (of 96 or 128 columns each, in sparse int4 rows of "
        "192, unless the row says otherwise). CPU minutes are those of `gblm prune`, one thread. "
        f"{origins(runs)}"
    )


def calibration(rows: list[Row]) -> str:
    """Sizes and text of the calibrations, if there are any, and how many seeds."""
    own = [row for row in rows if row.samples]
    if not own:
        return ""
    sizes = " or ".join(str(size) for size in sorted({row.samples for row in own}))
    texts = " or ".join(sorted({run["calibration_text"] for row in own for run in row.runs}))
    counts = ends(sorted({len(row.runs) for row in own}))
    seeds = f"mean ± standard deviation over {' to '.join(map(str, counts))} seeds"
    if counts == [1]:
        seeds = "one seed"
    return f"Calibration: {sizes} × {SEQ_LEN} tokens of {texts}; {seeds}. "


def ends(numbers: list[int]) -> list[int]:
    """The first and the last, once if they are the same."""
    return list(dict.fromkeys([*numbers[:1], *numbers[-1:]]))


def origins(runs: list[Run]) -> str:
    """Machines and versions once each, with all commits."""
    found: dict[str, dict[str, None]] = {}
    for run in runs:
        where, _, commit = origin(run, "torch", "transformers").partition("; commit ")
        device = "" if run["device"] == "cpu" else f"{run['provenance']['device']}, "
        found.setdefault(device + where, {})[commit.rstrip(".")] = None
    return " ".join(f"{where}; commit {', '.join(commits)}." for where, commits in found.items())
