"""The tables of README.md and docs/, from the records alone.

    python benchmarks/tables.py

Rewrites what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import budget
import decoding
import expert_speed
import kernel_speed
import memory
import onnx_speed
import published
import recovery
import rivals
import soak_tables
import summary
from pages import ROOT

# Page, name of the block, what makes it.
BLOCKS: tuple[tuple[str, str, Callable[[], str]], ...] = (
    ("README.md", "summary", summary.table),
    ("README.md", "larger", summary.larger),
    ("docs/results.md", "rivals", rivals.table),
    ("docs/results.md", "plain", recovery.plain),
    ("docs/results.md", "recovery", recovery.table),
    ("docs/results.md", "decoding", decoding.table),
    ("docs/onnx.md", "onnx", onnx_speed.table),
    ("docs/methods.md", "published", published.table),
    ("docs/methods.md", "runs", memory.table),
    ("docs/methods.md", "budget", budget.table),
    ("docs/kernels.md", "experts", expert_speed.table),
    ("docs/kernels.md", "kernels", kernel_speed.table),
    ("docs/reliability.md", "reliability", soak_tables.reliability),
)


def main() -> None:
    """Rewrite all pages."""
    for path, name, text in blocks():
        replace_block(path, name, text)
    (ROOT / "docs" / "recovery.svg").write_text(summary.figure())


def blocks() -> list[tuple[Path, str, str]]:
    """Make every block: its page, name and text."""
    return [(ROOT / page, name, make()) for page, name, make in BLOCKS]


def replace_block(path: Path, name: str, text: str) -> None:
    """Put a text between the two markers of a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = path.read_text().split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
