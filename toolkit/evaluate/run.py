"""One evaluation: a model, its dense baseline, texts and tasks, as `gblm eval` runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gblm.errors import UsageError
from gblm.evaluate.measure import known_baseline, measure
from gblm.evaluate.perplexity import Protocol
from gblm.evaluate.side_by_side import size_facts
from gblm.evaluate.subjects import Subject, detect, open_subject
from gblm.evaluate.tasks import Tasks, check_installed, run_tasks
from gblm.folder import read_config, resolve
from gblm.model import load_tokenizer
from gblm.progress import Progress, no_progress


@dataclass(frozen=True)
class Evaluation:
    """What is asked.

    Attributes:
        model: a folder or hub id.
        protocols: one per text; all of one dtype.
        tasks: of lm-evaluation-harness, if any.
        engine: a key of `subjects.ENGINES`; by the folder if None.
        baseline: the dense model; if None, the one that the folder names.
        without_baseline: measure none.
        device: of torch.
        backend: of packed weights in torch.
    """

    model: str
    protocols: tuple[Protocol, ...]
    tasks: Tasks | None = None
    engine: str | None = None
    baseline: str | None = None
    without_baseline: bool = False
    device: str = "cpu"
    backend: str | None = None


def run_evaluation(asked: Evaluation, progress: Progress = no_progress) -> dict[str, Any]:
    """Measure everything.

    Returns:
        The record: "texts" as of `measure`, "tasks" as of `run_tasks` or None, "baseline" with
        its "baseline_note", "size". Figures of the first text also stand on top.

    Raises:
        GblmError: what loading and measuring raise.
        UsageError: neither a text nor a task.
    """
    if not asked.protocols and asked.tasks is None:
        raise UsageError("nothing to evaluate: give --text or --tasks.")
    if asked.tasks is not None:
        check_installed()
    folder = resolve(asked.model)
    path, note = _baseline(asked, folder)
    tokenizer = load_tokenizer(folder)
    with _opened(asked, folder, path) as (subject, dense):
        texts = measure(subject, dense, asked.protocols, tokenizer, progress)
        length = int(read_config(folder).get("max_position_embeddings", 2048))
        tasks = run_tasks(asked.tasks, subject, dense, tokenizer, length) if asked.tasks else None
        first = texts[0] if texts else {}
        return {
            "kind": "evaluation",
            "model": asked.model,
            "engine": subject.engine,
            "dtype": subject.dtype,
            "baseline": str(path) if path else None,
            "baseline_note": note,
            "size": size_facts(folder),
            "texts": texts,
            "tasks": tasks,
            **{key: first[key] for key in FIRST if key in first},
        }


FIRST = ("protocol", "tokens_sha256", "perplexity", "perplexity_baseline", "ratio")


@contextlib.contextmanager
def _opened(
    asked: Evaluation, folder: Path, path: Path | None
) -> Iterator[tuple[Subject, Subject | None]]:
    """The model and its baseline, in one dtype; the baseline in torch unless asked for as it is."""
    dtype = asked.protocols[0].dtype if asked.protocols else "auto"
    subject = open_subject(folder, asked.engine, dtype, asked.device, asked.backend)
    try:
        dense = None
        if path is not None:
            # The same dtype on both sides: a ratio is owed to pruning, not to rounding.
            on_torch = detect(path) != "onnx"
            dense = open_subject(path, None, subject.dtype if on_torch else "auto", asked.device)
        yield subject, dense
    finally:
        subject.close()


def _baseline(asked: Evaluation, folder: Path) -> tuple[Path | None, str]:
    if asked.without_baseline:
        if asked.baseline:
            raise UsageError("--baseline and --no-baseline do not go together.")
        return None, "--no-baseline"
    if asked.baseline:
        return resolve(asked.baseline), "--baseline"
    return known_baseline(folder)
