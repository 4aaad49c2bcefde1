"""Record what `gblm search` measures beside what it predicted, on the real model.

    python benchmarks/budget.py [--model FOLDER] [--budget 3.1bits] [--limit 7]

Writes benchmarks/results/budget.json; goes on where it was cut off. Tables: benchmarks/tables.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from pages import RESULTS, ROOT, made_by, origin, table

from gblm.evaluate.perplexity import Protocol
from gblm.fetch import fetch
from gblm.recipe import Calibration, Recipe
from gblm.record import Record
from gblm.search.budget import parse_budget
from gblm.search.candidates import Question
from gblm.search.run import METRIC, UNPRUNED, Measuring, ranked, search

RECORD = RESULTS / "budget.json"
RUN = ROOT / "runs" / "budget"
TEXT = Calibration(num_samples=16, seq_len=256, order="sequential")


def main() -> None:
    """Search, and keep what the record needs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, help="an HF folder of SmolLM2-135M-Instruct")
    parser.add_argument("--budget", default="3.1bits")
    parser.add_argument("--limit", type=int, default=7)
    given = parser.parse_args()
    recipe = Recipe(
        model=str(given.model or fetch("smollm2")), method="sparsegpt", pattern="dense",
        values="int8", rounding="obs", calibration=TEXT,
    )  # fmt: skip
    question = Question(recipe, parse_budget(given.budget))
    protocol = Protocol("pydoc", 512, dtype="bfloat16")
    found = search(question, Measuring(RUN / given.budget, given.limit, protocol))
    load = found.loads[0]
    record = {
        "kind": "budget",
        "command": made_by(),
        "provenance": found.provenance,
        "recipe": recipe.to_dict() | {"model": "smollm2"},
        "budget": given.budget,
        "baseline": {"perplexity": found.value(UNPRUNED, load, METRIC), "protocol": load},
        "pass": found.provenance["pass"],
        "verdict": found.verdict.notes[0],
        "candidates": [candidate(found, name) for name in ranked(found)],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    RECORD.write_text(json.dumps(record, indent=2) + "\n")


def candidate(found: Record, name: str) -> dict[str, Any]:
    """One measured candidate, with what was predicted of it."""
    load, facts = found.loads[0], dict(found.sides[name])
    ratio = found.ratio(name, load, METRIC)
    measured = {key: facts.pop(key) for key in ("bytes", "bits_per_weight", "sparsity")} | {
        "perplexity": found.value(name, load, METRIC), "ratio": ratio and ratio.median,
    }  # fmt: skip
    return {"name": name, **facts, **facts.pop("predicted"), "measured": measured}


def budget() -> str:
    """The table of docs/methods.md."""
    if not RECORD.exists():
        return "Nothing has been recorded yet."
    record: dict[str, Any] = json.loads(RECORD.read_text())
    head = ["SmolLM2-135M", "what", "bits/weight", "perplexity", "ratio", "predicted ratio"]
    rows = [
        [
            row["name"] + ("" if row["fits"] else " (over budget)"),
            row["what"],
            f"{row['measured']['bits_per_weight']:.2f}",
            f"{row['measured']['perplexity']:.2f}",
            f"{row['measured']['ratio']:.2f}",
            f"{row['ratio']:.2f}",
        ]
        for row in record["candidates"]
    ]
    rows.append(["unpruned", "", "16", f"{record['baseline']['perplexity']:.2f}", "1", ""])
    notes = (
        f"Budget {record['budget']}; one seed. Perplexity: {record['baseline']['protocol']}. "
        f"Calibration: {TEXT.num_samples} × {TEXT.seq_len} tokens of the other part of that text; "
        f"sparsegpt, sequential, rounding obs. The pass took {record['pass']['seconds']:.0f} s. "
    )
    return table(head, rows) + "\n\n" + notes + origin(record, "torch", "transformers")


if __name__ == "__main__":
    main()
