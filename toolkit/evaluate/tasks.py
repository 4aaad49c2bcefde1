"""Which tasks of lm-evaluation-harness are asked for; `gblm.evaluate.harness` runs them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gblm.errors import MachineError

# The zero-shot set of Wanda's and GBLM-Pruner's papers.
PAPERS = (
    "boolq", "rte", "hellaswag", "winogrande", "arc_challenge", "arc_easy", "openbookqa",
)  # fmt: skip


@dataclass(frozen=True)
class Tasks:
    """The tasks say what is asked of the harness.

    `path` is a folder with tasks of one's own; `limit` takes the first so many examples of each
    task, all if None.
    """

    names: tuple[str, ...]
    path: Path | None = None
    limit: int | None = None

    def line(self, task: str) -> str:
        """Write the protocol of a task in one line, which is its load in a record."""
        limit = "all examples" if self.limit is None else f"the first {self.limit} examples"
        return f"{task}, lm-eval {version('lm-eval')}, 0-shot, {limit}, seed 0"


def task_names(text: str) -> tuple[str, ...]:
    """Read a list with commas; "papers" stands for the tasks of the papers."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(
        dict.fromkeys(one for name in asked for one in (PAPERS if name == "papers" else (name,)))
    )


def require_harness(what: str) -> None:
    """Refuse what needs the harness where it is not installed.

    Raises:
        MachineError: it is not.
    """
    try:
        version("lm-eval")
    except PackageNotFoundError as error:
        raise MachineError(
            f"{what} needs lm-evaluation-harness: pip install 'gblm-toolkit[eval]'."
        ) from error
