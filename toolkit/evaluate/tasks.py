"""Tasks of lm-evaluation-harness, with the dense baseline's result and the stderr beside each."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gblm.errors import MachineError
from gblm.evaluate.subjects import Subject

# The zero-shot set of Wanda's and GBLM-Pruner's papers.
PAPERS = (
    "boolq", "rte", "hellaswag", "winogrande", "arc_challenge", "arc_easy", "openbookqa",
)  # fmt: skip
METRICS = ("acc", "acc_norm", "exact_match", "word_perplexity")


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

    def line(self, subject: Subject) -> str:
        """The protocol in one line."""
        limit = "all examples" if self.limit is None else f"the first {self.limit} examples"
        return (
            f"lm-eval {version('lm-eval')}, 0-shot, {limit}, seed {self.seed}, {subject.dtype}, "
            f"{subject.engine}"
        )


def task_names(text: str) -> tuple[str, ...]:
    """Names of a list with commas; "papers" stands for those of the papers."""
    asked = [name.strip() for name in text.split(",") if name.strip()]
    return tuple(
        dict.fromkeys(one for name in asked for one in (PAPERS if name == "papers" else (name,)))
    )


def check_tasks(tasks: Tasks) -> None:
    """Refuse before a model is loaded.

    Raises:
        MachineError: the harness is not installed.
        UsageError: it does not know a task.
    """
    try:
        version("lm-eval")
    except PackageNotFoundError as error:
        raise MachineError(
            "--tasks needs lm-evaluation-harness: pip install 'gblm-toolkit[eval]'."
        ) from error
    from gblm.evaluate.harness import check_known

    check_known(tasks.names, tasks.path)


def run_tasks(
    tasks: Tasks, subject: Subject, dense: Subject | None, tokenizer: Any, max_length: int
) -> dict[str, Any]:
    """Run tasks on the model and on its baseline.

    Args:
        tasks: which.
        subject: what is judged.
        dense: what it is held against, on the same examples.
        tokenizer: of both.
        max_length: tokens that fit.

    Returns:
        "protocol", and "results": task → metric → "value", "stderr", and those of the baseline.

    Raises:
        GblmError: see `harness.run`.
    """
    from gblm.evaluate.harness import run

    asked = (list(tasks.names), tasks.path, tasks.limit, tasks.seed)
    rows = _metrics(run(subject, tokenizer, max_length, *asked))
    if dense is not None:
        for name, metrics in _metrics(run(dense, tokenizer, max_length, *asked)).items():
            for metric, figures in metrics.items():
                rows[name][metric] |= {
                    "baseline": figures["value"], "baseline_stderr": figures["stderr"],
                }  # fmt: skip
    return {"protocol": tasks.line(subject), "results": rows}


def _metrics(results: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """Out of the harness's "metric,filter" and "metric_stderr,filter"."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, row in results.items():
        found[name] = {}
        for key, value in row.items():
            metric, _, chosen = key.partition(",")
            if metric in METRICS:
                error = row.get(f"{metric}_stderr,{chosen}")
                found[name][metric] = {
                    "value": float(value),
                    "stderr": error if isinstance(error, float) else None,
                }
    return found
