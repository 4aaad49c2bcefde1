"""What `gblm search` measures beside what it predicted, on the real model.

    python benchmarks/budget.py

Writes benchmarks/results/budget.json, which is the search's own record; goes on where it was cut
off.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pages

from gblm.fetch import fetch
from gblm.record import Record
from gblm.search.run import METRIC, STATE, UNPRUNED, ranked

RECORD = pages.RESULTS / "budget.json"
BUDGET = "3.1bits"
RECIPE = "--preset fast --calibration pydoc --num-samples 16 --seq-len 256"
TEXT = "--text pydoc"


def measure(folder: Path) -> None:
    """Search, and keep its record."""
    pages.gblm(
        f"search '{fetch('smollm2')}' --budget {BUDGET} --limit 7 {RECIPE} {TEXT} "
        f"--output '{folder}'"
    )
    shutil.copy(folder / STATE, RECORD)


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
        "sparsegpt, sequential, rounding obs. The pass took "
        f"{record.provenance['pass']['seconds']:.0f} s. "
        f"{pages.origin(record.as_json(), 'torch', 'transformers')}"
    )


if __name__ == "__main__":
    measure(pages.ROOT / "runs" / "budget" / BUDGET)
