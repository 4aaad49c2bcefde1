"""Section: a part of the check with its share of the minutes; it says what it skipped and why."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

logger = logging.getLogger(__name__)
T = TypeVar("T")
# A device that has met an illegal access fails everything that follows.
MAX_FAILURES = 25
Clock = Callable[[], float]


@dataclass
class Section:
    """What happens in a section.

    Attributes:
        name: in the record.
        deadline: on the clock; nothing begins after it.
        clock: in seconds.
        rows: results, plain JSON types.
        skipped: what was left out, each with the reason.
        failed: what raised, each with the error.
    """

    name: str
    deadline: float
    clock: Clock = time.perf_counter
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    @property
    def seconds_left(self) -> float:
        """Until the deadline; not negative."""
        return max(0.0, self.deadline - self.clock())

    def skip(self, what: str, why: str) -> None:
        """Note what is left out."""
        self.skipped.append(f"{what}: {why}")

    def attempt(self, what: str, work: Callable[[], T]) -> T | None:
        """Run a piece of the section, unless its time is over.

        What it raises is noted, and the check goes on: one kernel that fails shall not cost the
        measurements of all others.
        """
        if not self.seconds_left:
            self.skip(what, "no time left")
            return None
        if len(self.failed) >= MAX_FAILURES:
            self.skip(what, "too much has failed before")
            return None
        try:
            return work()
        except torch.OutOfMemoryError:
            self.skip(what, "too little memory")
        except Exception as error:
            logger.debug("gblm: %s: %s", self.name, what, exc_info=True)
            text = (str(error).splitlines() or [""])[0]
            self.failed.append(f"{what}: {type(error).__name__}: {text[:300]}")
        return None

    def record(self, began: float) -> dict[str, Any]:
        """As plain JSON types, with the seconds that it took."""
        return {
            "seconds": round(self.clock() - began, 1),
            "rows": self.rows,
            "skipped": self.skipped,
            "failed": self.failed,
        }
