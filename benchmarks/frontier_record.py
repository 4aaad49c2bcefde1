"""The record of frontier.py: runs by case, calibration size and seed, added one at a time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from frontier_cases import CASES

RECORD = Path(__file__).resolve().parent / "results" / "frontier.json"
WINDOW = 512


class Key(NamedTuple):
    """What makes a run one of its kind; 0 samples: the case needs no calibration text."""

    case: str
    samples: int
    seed: int


def key_of(run: dict[str, Any]) -> Key:
    """Of a run of the record."""
    return Key(run["case"], run["samples"], run["seed"])


def is_there(record: dict[str, Any], key: Key, full: bool) -> bool:
    """Whether the record holds this run, made as the case now says."""
    case = CASES[key.case]
    return any(
        key_of(run) == key
        and (run["recipe"], run["narrow"]) == (case.recipe, case.narrow)
        and (not full or "full" in run["perplexity"])
        for run in record["runs"]
    )


def read(path: Path) -> dict[str, Any]:
    """A record; a new one if there is none."""
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    protocol = f"windows of {WINDOW} tokens, no overlap, no special tokens, float32"
    return {"kind": "frontier", "model": "smollm2", "protocol": protocol, "runs": []}


def add(path: Path, runs: list[dict[str, Any]]) -> None:
    """Put runs into the record, in the place of older ones of the same key; whole or not at all."""
    record = read(path)
    known = {key_of(run): run for run in [*record["runs"], *runs]}
    order = list(CASES)
    record["runs"] = sorted(
        known.values(),
        key=lambda run: (order.index(run["case"]), run["samples"], run["seed"]),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, indent=2) + "\n")
    partial.replace(path)
