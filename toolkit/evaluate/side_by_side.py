"""Two model folders beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gblm.evaluate.run import size_facts


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Tell what both are, row by row.

    Returns:
        "a" and "b", and "rows": each with "what", "a", "b" and, for numbers, "ratio" b/a.
    """
    facts = size_facts(a), size_facts(b)
    names = [*facts[0], *(name for name in facts[1] if name not in facts[0])]
    rows = [_row(name, facts[0].get(name), facts[1].get(name)) for name in names]
    return {"a": str(a), "b": str(b), "rows": rows}


def _row(name: str, a: Any, b: Any) -> dict[str, Any]:
    row = {"what": name, "a": a, "b": b}
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (a, b))
    return row | ({"ratio": b / a} if numbers and a else {})
