"""How good the candidates of `gblm search` are beside what it predicted, on the real model.

    python benchmarks/budget.py

Writes benchmarks/results/budget.json; goes on where it was cut off.
"""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import pages

from gblm.fetch import fetch
from gblm.provenance import provenance
from gblm.record import Record, Row

RECORD = pages.RESULTS / "budget.json"
BUDGET, UNPRUNED, METRIC = "3.7bits", "unpruned", "perplexity"
TEXT = "--text pydoc --seq-len 512 --max-windows 32 --no-baseline"


def measure(folder: Path) -> None:
    """Make every candidate, measure it, and write the record."""
    model = fetch("smollm2")
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    found = pages.alone(
        "-m", "gblm", "search", str(model), "--budget", BUDGET, "--calibration", "pydoc",
        "--num-samples", "16", "--seq-len", "256", "--json",
    )  # fmt: skip
    seconds = round(time.monotonic() - began, 1)
    sides: dict[str, dict[str, Any]] = {UNPRUNED: {}}
    rows = [perplexity(UNPRUNED, model, folder / "unpruned.json")]
    for number, row in enumerate(found["rows"]):
        made, recipe = folder / str(number), folder / f"{number}.recipe.json"
        # Predictions are of what pruning and rounding cost, before anything is trained.
        recipe.write_text(json.dumps(row["recipe"] | {"reconstruct": None, "recover": None}))
        if not made.exists():
            pages.gblm(f"prune --recipe '{recipe}' --output '{made}'")
        report = json.loads((made / "sparsity_report.json").read_text())
        sides[row["name"]] = {key: row[key] for key in ("dense", "fits", "what", "recipe")} | {
            "predicted": {key: row[key] for key in ("bits_per_weight", "bytes", "loss", "ratio")},
            "bytes": report["bytes_packed"], "bits_per_weight": report["bits_per_weight"],
        }  # fmt: skip
        rows.append(perplexity(row["name"], made, folder / f"{number}.json"))
    origin = provenance() | {"search": {"budget": BUDGET}, "pass": {"seconds": seconds}}
    command = pages.made_by()
    record = Record("search", sides, tuple(rows), UNPRUNED, provenance=origin, command=command)
    pages.save(record, RECORD)


def perplexity(side: str, model: Path, record: Path) -> Row:
    """Measure a folder, unless that was done."""
    if not record.exists():
        pages.gblm(f"eval '{model}' {TEXT} --output '{record}'")
    row = next(row for row in Record.read(record).rows if row.metric == METRIC)
    return Row(side, row.load, METRIC, "", row.value)


def ranked(record: Record) -> list[str]:
    """Name the candidates, the lowest perplexity first."""
    found = [(r.value or math.inf, r.side) for r in record.rows if r.side != UNPRUNED]
    return [side for _, side in sorted(found)]


def table() -> str:
    """Put what was measured beside what was predicted, the best first."""
    record = Record.read(RECORD)
    load, rows = record.loads[0], []
    for name in ranked(record):
        facts, ratio = record.sides[name], record.ratio(name, load, METRIC)
        rows.append([
            name + ("" if facts["fits"] else " (over budget)"), facts["what"],
            f"{facts['bits_per_weight']:.2f}", f"{record.value(name, load, METRIC):.2f}",
            f"{ratio.median:.2f}" if ratio else "–", f"{facts['predicted']['ratio']:.2f}",
        ])  # fmt: skip
    rows.append(["unpruned", "", "16", f"{record.value(UNPRUNED, load, METRIC):.2f}", "1", ""])
    header = ["SmolLM2-135M", "what", "bits/weight", "perplexity", "ratio", "predicted ratio"]
    return (
        f"{pages.table(header, rows)}\n\nBudget {record.provenance['search']['budget']}; one seed. "
        f"Perplexity: {load}. Calibration: 16 × 256 tokens of the other part of that text; "
        "alps, sequential, rounding obs, nothing trained. The pass took "
        f"{record.provenance['pass']['seconds']:.0f} s. "
        f"{pages.origin(record.as_json(), 'torch', 'transformers')}"
    )


if __name__ == "__main__":
    measure(pages.ROOT / "runs" / "budget" / BUDGET)
