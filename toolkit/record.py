"""The one record that everything which measures writes, and its one reader.

A record is a JSON object:

    {"kind": "bench", "command": "gblm bench dense packed", "provenance": {"commit": …},
     "baseline": "dense",
     "sides": {"dense": {"folder": "dense", "bytes": 2200000000}, "packed": {…}},
     "verdict": {"valid": true, "reasons": [], "notes": []},
     "rows": [{"side": "packed", "load": "64 + 32 tokens", "metric": "tpot_ms_p50", "unit": "ms",
               "value": 12.5, "rounds": [12.4, 12.5, 12.9]}]}

Readers look for rows by side, load and metric. A figure that does not stand has no row; the verdict
says why. `kind` is a title for people: nothing depends on it.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from gblm.errors import InputError
from gblm.files import read_json
from gblm.provenance import provenance

CONFIDENCE = 0.95
# An absolute path, alone or behind "--option=", "name=" or "engine:"; not the "//" of an address.
LOCAL_PATH = re.compile(r"(^|[=:,])(?!//)~?/(?:[^/=:,]*/)*([^/=:,]*)")


@dataclass(frozen=True)
class Row:
    """A row is one figure of a side under a load.

    The side is a key of the record's sides: a model, a kernel, a candidate. The load is what it was
    asked to do: requests, a shape and tokens, a text; rows of two records can be compared where it
    is equal. The value is None where the measurement gave no finite number. The figures of the
    rounds are in order, so that two sides pair up. The interval holds the value with 95 %
    confidence, if that is known otherwise than from the rounds.
    """

    side: str
    load: str
    metric: str
    unit: str
    value: float | None
    rounds: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None

    @classmethod
    def of_rounds(
        cls, side: str, load: str, metric: str, unit: str, rounds: Sequence[float]
    ) -> Row:
        """Make a row whose value is the median of its rounds."""
        return cls(side, load, metric, unit, statistics.median(rounds), tuple(rounds))


@dataclass(frozen=True)
class Verdict:
    """A verdict says whether the figures stand.

    It is not valid if one that was asked for is missing or must not be believed, for `reasons`;
    `notes` say what to mind although the figures stand.
    """

    valid: bool
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """A ratio is a side's figure over its baseline's, paired round by round.

    `low` and `high` bound the median of the rounds with 95 % confidence. Without rounds all three
    are the ratio of both values.
    """

    median: float
    low: float
    high: float
    rounds: tuple[float, ...] = ()


@dataclass(frozen=True)
class Record:
    """A record holds what one command measured.

    The sides hold facts of each, as plain JSON; the baseline is the side that ratios refer to. The
    provenance is machine, versions, commit, time, and the settings of the measurement. The command
    repeats it, and names no private folders.
    """

    kind: str
    sides: Mapping[str, Mapping[str, Any]]
    rows: tuple[Row, ...]
    baseline: str | None = None
    verdict: Verdict = field(default_factory=lambda: Verdict(True))
    provenance: Mapping[str, Any] = field(default_factory=provenance)
    command: str = field(default_factory=lambda: this_command())

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a record that `write` wrote.

        Raises:
            InputError: the file is missing, or holds no such record.
        """
        found = read_json(path)
        try:
            # What a file lacks shall not be filled with the defaults of this class.
            return _RECORD.validate_python({part.name: found[part.name] for part in fields(cls)})
        except KeyError as error:
            flaw = f"{error} is missing"
        except ValidationError as error:
            first = error.errors()[0]
            flaw = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise InputError(f"{path} is not a record of this version of gblm ({flaw}): measure again.")

    def write(self, path: Path) -> None:
        """Write the record as JSON; a folder that is missing is made."""
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_json(), indent=2, ensure_ascii=False, allow_nan=False)
        path.write_text(text + "\n", encoding="utf-8")

    def as_json(self) -> dict[str, Any]:
        """Give the record as plain JSON types; numbers that are not finite become None."""
        found: dict[str, Any] = json.loads(_RECORD.dump_json(self))
        return found

    def row(self, side: str, load: str, metric: str) -> Row | None:
        """Find a row; None if it was not measured, or did not stand."""
        wanted = (side, load, metric)
        return next((r for r in self.rows if (r.side, r.load, r.metric) == wanted), None)

    def value(self, side: str, load: str, metric: str) -> float | None:
        """Find a figure; None if it was not measured, or did not stand."""
        row = self.row(side, load, metric)
        return None if row is None else row.value

    def ratio(self, side: str, load: str, metric: str, baseline: str | None = None) -> Ratio | None:
        """Divide a side's figure by another's under the same load, round by round.

        Args:
            side: a name of `sides`.
            load: of both figures.
            metric: of both figures.
            baseline: the other side; the record's own baseline if None.

        Returns:
            None where a figure is missing, a baseline's is zero or the rounds do not pair up.
        """
        other = baseline or self.baseline
        ours = self.row(side, load, metric)
        theirs = None if other is None else self.row(other, load, metric)
        if ours is None or theirs is None or ours.value is None or not theirs.value:
            return None
        if not ours.rounds and not theirs.rounds:
            value = ours.value / theirs.value
            return Ratio(value, value, value)
        if len(ours.rounds) != len(theirs.rounds) or not all(theirs.rounds):
            return None
        rounds = tuple(a / b for a, b in zip(ours.rounds, theirs.rounds, strict=True))
        return Ratio(statistics.median(rounds), *median_interval(rounds), rounds)

    @property
    def loads(self) -> list[str]:
        """List every load once, in the order of the rows."""
        return list(dict.fromkeys(row.load for row in self.rows))

    @property
    def metrics(self) -> list[str]:
        """List every metric once, in the order of the rows."""
        return list(dict.fromkeys(row.metric for row in self.rows))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Bound the true median with 95 % confidence, whatever the distribution.

    They are ordered values (sign test): as many values lie below the lower one as a fair coin shows
    heads at most in 2.5 % of such series. Of fewer than six values they are the smallest and the
    largest, and the confidence is less.
    """
    ordered, count = sorted(values), len(values)
    outside, below = 0, 0.0
    for heads in range(count // 2):
        below += math.comb(count, heads) / 2**count
        if below > (1 - CONFIDENCE) / 2:
            break
        outside = heads
    return ordered[outside], ordered[count - 1 - outside]


def this_command() -> str:
    """Write down the call of this process for a record."""
    program, *arguments = sys.argv
    if Path(program).name in ("gblm", "__main__.py"):
        return command_line(arguments)
    return shlex.join(["python", *map(without_folders, [program, *arguments])])


def command_line(arguments: Sequence[str]) -> str:
    """Write down a call of gblm; of absolute paths only the last part, as others are private."""
    return shlex.join(["gblm", *map(without_folders, arguments)])


def without_folders(word: str) -> str:
    """Shorten an absolute path in a word of a command line to its last part."""
    return LOCAL_PATH.sub(r"\1\2", word)


_RECORD = TypeAdapter(Record)
