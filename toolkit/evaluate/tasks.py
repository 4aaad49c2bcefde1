"""Tasks of lm-evaluation-harness as rows of a record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gblm.errors import MachineError
from gblm.evaluate.subjects import Subject
from gblm.record import Row

# The zero-shot set of Wanda's and GBLM-Pruner's papers.
PAPERS = (
    "boolq", "rte", "hellaswag", "winogrande", "arc_challenge", "arc_easy", "openbookqa",
)  # fmt: skip
# Metric → its unit; others of the harness are left out.
METRICS = {"acc": "share", "acc_norm": "share", "exact_match": "share", "word_perplexity": ""}
# Standard errors on both sides of a mean, for an interval of 95 %.
ERRORS = 1.96


@dataclass(frozen=True)
class Tasks:
    """What is asked of the harness.

    Attributes:
        names: of its tasks, "papers" resolved.
        path: a folder with tasks of one's own.
        limit: the first so many examples of each task; all if None.
        seed: of everything that is drawn.
    """

    names: tuple[str, ...]
    path: Path | None = None
    limit: int | None = None
    seed: int = 0

    def line(self, task: str) -> str:
        """Write the protocol of a task in one line, which is its load in a record."""
        limit = "all examples" if self.limit is None else f"the first {self.limit} examples"
        return f"{task}, lm-eval {version('lm-eval')}, 0-shot, {limit}, seed {self.seed}"


def task_names(text: str) -> tuple[str, ...]:
    """Read a list with commas; "papers" stands for the tasks of the papers."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(
        dict.fromkeys(one for name in asked for one in (PAPERS if name == "papers" else (name,)))
    )


def check_tasks(tasks: Tasks) -> None:
    """Refuse what cannot be run before a model is loaded.

    Raises:
        MachineError: the harness is not installed.
        UsageError: it does not know a task.
    """
    require_harness("--tasks")
    from gblm.evaluate.harness import check_known

    check_known(tasks.names, tasks.path)


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


def run_tasks(
    tasks: Tasks, sides: Mapping[str, Subject], tokenizer: Any, max_length: int
) -> list[Row]:
    """Run the tasks on each side, on the same examples.

    Args:
        tasks: which.
        sides: models by name.
        tokenizer: of all of them.
        max_length: tokens that fit.

    Raises:
        GblmError: see `harness.run`.
    """
    from gblm.evaluate.harness import run

    rows: list[Row] = []
    for side, subject in sides.items():
        found = run(subject, tokenizer, max_length, tasks)
        rows += [row for task, values in found.items() for row in _rows(side, tasks, task, values)]
    return rows


def _rows(side: str, tasks: Tasks, task: str, values: dict[str, Any]) -> Iterator[Row]:
    """Read the harness's "metric,filter" and "metric_stderr,filter"."""
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if metric not in METRICS:
            continue
        error = values.get(f"{metric}_stderr,{chosen}")
        # A mean of one example has none.
        half = ERRORS * error if isinstance(error, float) else None
        interval = None if half is None else (value - half, value + half)
        yield Row(side, tasks.line(task), metric, METRICS[metric], float(value), (), interval)
