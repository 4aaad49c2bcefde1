"""Progress: how long work reports its steps, without knowing of terminals."""

from __future__ import annotations

from collections.abc import Callable

# Called with the name of a phase and the number of its steps; returns what to call per step.
Progress = Callable[[str, int], Callable[[], None]]


def no_progress(phase: str, steps: int) -> Callable[[], None]:
    """Report to nobody."""
    return lambda: None
