"""One rank of a torchrun job: `rank.py CIRCUMSTANCE ARGUMENT...` runs `gblm ARGUMENT...`."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path


def killed_after_one_layer() -> None:
    """Rank 0 is killed when the second layer's line is halfway in the journal."""
    from killing import dying

    from gblm.checkpoint import resume

    if os.environ["RANK"] == "0":
        resume.append_line = dying([2], resume.append_line, _half_a_line)


def short_of_memory() -> None:
    """Nothing fits: activations lie on disk, those of all decoder layers for gradients."""
    from gblm.calibrate import activations

    activations.MEMORY_SHARE = 0.0


def _half_a_line(path: Path, value: object) -> None:
    with path.open("ab") as journal:
        journal.write(b'{"layer": 1, "file": "la')


CIRCUMSTANCES: tuple[Callable[[], None], ...] = (killed_after_one_layer, short_of_memory)

if __name__ == "__main__":
    chosen = sys.argv.pop(1)
    next(c for c in CIRCUMSTANCES if c.__name__ == chosen)()
    from gblm.cli import main

    main()
