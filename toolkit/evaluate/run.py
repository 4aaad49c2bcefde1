"""One evaluation: a model, its dense baseline, texts and tasks, as `gblm eval` runs it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gblm.errors import UsageError
from gblm.evaluate.measure import known_baseline, measure
from gblm.evaluate.perplexity import Protocol
from gblm.evaluate.served import ServedSubject, is_address
from gblm.evaluate.side_by_side import size_facts
from gblm.evaluate.subjects import Subject, detect, open_subject
from gblm.evaluate.tasks import Tasks, check_tasks, run_tasks
from gblm.folder import read_config, resolve
from gblm.model import load_tokenizer
from gblm.progress import Progress, no_progress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What is asked.

    Attributes:
        model: a folder or hub id, or the address of a running vLLM server.
        protocols: one per text; all of one dtype.
        tasks: of lm-evaluation-harness, if any.
        engine: a key of `subjects.ENGINES`; by the folder if None.
        baseline: the dense model; if None, the one that the folder names.
        without_baseline: measure none.
        needs_baseline: refuse to go on without one.
        device: of torch.
        backend: of packed weights in torch.
        tokenizer: folder of a served model's, where the server does not run on this machine.
        api_key_file: of the server.
    """

    model: str
    protocols: tuple[Protocol, ...]
    tasks: Tasks | None = None
    engine: str | None = None
    baseline: str | None = None
    without_baseline: bool = False
    needs_baseline: bool = False
    device: str = "cpu"
    backend: str | None = None
    tokenizer: str | None = None
    api_key_file: Path | None = None


def run_evaluation(asked: Evaluation, progress: Progress = no_progress) -> dict[str, Any]:
    """Measure everything.

    Returns:
        The record: "texts" as of `measure`, "tasks" as of `run_tasks` or None, "baseline" with
        its "baseline_note", "size" and "size_baseline". Figures of the first text also stand on
        top.

    Raises:
        GblmError: what loading and measuring raise.
        UsageError: neither a text nor a task, or no baseline where one is needed.
    """
    if not asked.protocols and asked.tasks is None:
        raise UsageError("nothing to evaluate: give --text or --tasks.")
    if asked.tasks is not None:
        check_tasks(asked.tasks)
    served = _served(asked)
    model = served or resolve(asked.model)
    folder = model.folder if isinstance(model, ServedSubject) else model
    path, note = _baseline(asked, folder)
    if asked.needs_baseline and path is None:
        raise UsageError(f"a gate needs the dense model to compare with: {note}.")
    home = _home(asked, folder, path)
    tokenizer = load_tokenizer(home)
    length = int(read_config(home).get("max_position_embeddings", 2048))
    _warn_of_long_windows(asked.protocols, length)
    with _opened(asked, model, path) as (subject, dense):
        texts = measure(subject, dense, asked.protocols, tokenizer, progress)
        length = min(length, (served and served.max_tokens) or length)
        tasks = run_tasks(asked.tasks, subject, dense, tokenizer, length) if asked.tasks else None
        first = texts[0] if texts else {}
        return {
            "kind": "evaluation",
            "model": served.name if served else asked.model,
            **({"server": served.url} if served else {}),
            "engine": subject.engine,
            "dtype": subject.dtype,
            "baseline": str(path) if path else None,
            "baseline_note": note,
            "size": size_facts(folder) if folder else None,
            "size_baseline": size_facts(path) if path else None,
            "texts": texts,
            "tasks": tasks,
            **{key: first[key] for key in FIRST if key in first},
        }


FIRST = ("protocol", "tokens_sha256", "perplexity", "perplexity_baseline", "ratio")


@contextlib.contextmanager
def _opened(
    asked: Evaluation, model: Path | ServedSubject, path: Path | None
) -> Iterator[tuple[Subject, Subject | None]]:
    """The model and its baseline, in one dtype; the baseline in torch unless asked for as it is."""
    subject = (
        model
        if isinstance(model, ServedSubject)
        else open_subject(model, asked.engine, _dtype(asked), asked.device, asked.backend)
    )
    try:
        dense = None
        if path is not None:
            # The same dtype on both sides, where it is known: a ratio is owed to pruning.
            own = detect(path) == "onnx" or isinstance(subject, ServedSubject)
            dense = open_subject(path, None, "auto" if own else subject.dtype, asked.device)
        yield subject, dense
    finally:
        subject.close()


def _warn_of_long_windows(protocols: Sequence[Protocol], positions: int) -> None:
    longest = max((protocol.seq_len for protocol in protocols), default=0)
    if longest > positions:
        logger.warning(
            "windows of %d tokens are longer than the model's max_position_embeddings of %d: it "
            "never learned such places, so perplexity and drift say little; lower --seq-len",
            longest, positions,
        )  # fmt: skip


def _dtype(asked: Evaluation) -> str:
    return asked.protocols[0].dtype if asked.protocols else "auto"


def _served(asked: Evaluation) -> ServedSubject | None:
    """The model behind an address; None for a folder or hub id."""
    if not is_address(asked.model):
        if asked.tokenizer or asked.api_key_file:
            raise UsageError("--tokenizer and --api-key-file go with the address of a server only.")
        return None
    if asked.engine not in (None, "vllm"):
        raise UsageError(f"--engine {asked.engine} loads a folder; servers run vLLM.")
    if _dtype(asked) != "auto" or asked.backend:
        raise UsageError("--dtype and --backend do not go with a server, which has its own.")
    return ServedSubject(asked.model, asked.api_key_file)


def _home(asked: Evaluation, folder: Path | None, path: Path | None) -> Path:
    """The folder of the tokenizer."""
    home = resolve(asked.tokenizer) if asked.tokenizer else folder or path
    if home is None:
        raise UsageError(
            f"{asked.model}: its model is no folder of this machine: give --baseline or "
            "--tokenizer, whose tokens are the model's."
        )
    return home


def _baseline(asked: Evaluation, folder: Path | None) -> tuple[Path | None, str]:
    if asked.without_baseline:
        if asked.baseline:
            raise UsageError("--baseline and --no-baseline do not go together.")
        return None, "--no-baseline"
    if asked.baseline:
        return resolve(asked.baseline), "--baseline"
    if folder is None:
        return None, "the server does not run on this machine; give --baseline"
    return known_baseline(folder)
