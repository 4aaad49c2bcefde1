"""A picture of a search: perplexity against bits per weight, measured beside predicted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(result: Mapping[str, Any], path: Path) -> bool:
    """Draw an SVG; needs matplotlib.

    Args:
        result: of `gblm.budget.search.search`.
        path: of the file.

    Returns:
        False, and no file, where matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    rows, dense = result["candidates"], result["baseline"]["perplexity"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    edge = sorted(
        (row["measured"]["bits_per_weight"], row["measured"]["perplexity"])
        for row in rows
        if row["on_frontier"]
    )
    axes.plot(*zip(*edge, strict=True), color="tab:blue", linewidth=1, label="frontier, measured")
    for is_dense, marker, name in ((False, "o", "with zeros"), (True, "s", "dense")):
        own = [row for row in rows if row["dense"] == is_dense]
        bits = [row["measured"]["bits_per_weight"] for row in own]
        measured = [row["measured"]["perplexity"] for row in own]
        axes.scatter(bits, measured, marker=marker, color="tab:blue", label=f"{name}, measured")
        axes.scatter(
            bits, [dense * row["ratio"] for row in own], marker=marker, facecolors="none",
            edgecolors="tab:orange", label=f"{name}, predicted",
        )  # fmt: skip
    for row in rows:
        place = (row["measured"]["bits_per_weight"], row["measured"]["perplexity"])
        axes.annotate(row["name"], place, xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.axhline(dense, color="grey", linewidth=0.8, linestyle="--", label="unpruned")
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight of the pruned linears, masks and scales counted")
    axes.set_ylabel("perplexity")
    axes.set_title(f"budget {result['budget']}; {result['baseline']['protocol']}", fontsize=7)
    axes.legend(fontsize=7)
    figure.savefig(path, format="svg")
    return True
