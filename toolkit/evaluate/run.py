"""One evaluation: a model, its dense baseline, texts and tasks, as `gblm eval` runs it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gblm.cache import recall
from gblm.checkpoint.inspect import sizes
from gblm.errors import InputError, UsageError
from gblm.evaluate.perplexity import Protocol, measure
from gblm.evaluate.subjects import (
    ONNX_MODEL,
    ONNX_REPORT,
    Subject,
    folder_kind,
    open_subject,
)
from gblm.evaluate.tasks import Tasks, require_harness
from gblm.files import read_json
from gblm.model.folder import ModelFolder, model_name
from gblm.model.loading import load_tokenizer
from gblm.model.packed_reader import RECIPE_FILE
from gblm.progress import Progress, no_progress
from gblm.recipe import read_recipe
from gblm.record import Record, Verdict

if TYPE_CHECKING:
    from gblm.evaluate.harness import ServedSubject

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """An evaluation says what is asked of a model: a folder, hub id, or address of a vLLM server.

    There is a protocol for each text. The baseline is the dense model, by default the one that the
    folder names, and needed with `needs_baseline`. The device and the backend are those of torch. A
    server may need its API key.
    """

    model: str
    protocols: tuple[Protocol, ...]
    tasks: Tasks | None = None
    baseline: str | None = None
    without_baseline: bool = False
    needs_baseline: bool = False
    dtype: str = "auto"
    device: str = "cpu"
    backend: str | None = None
    api_key: str | None = None

    @property
    def seq_len(self) -> int:
        """Count the tokens of the longest windows; 0 without texts."""
        return max((protocol.seq_len for protocol in self.protocols), default=0)


def run_evaluation(asked: Evaluation, progress: Progress = no_progress) -> Record:
    """Measure everything.

    Returns:
        A record whose first side is the model; its first row is the model's perplexity on the
        first text, if there is one. Of the baseline there are the same figures but the drift.

    Raises:
        GblmError: what loading and measuring raise.
        UsageError: neither a text nor a task, or no baseline where one is needed.
    """
    if not asked.protocols and asked.tasks is None:
        raise UsageError("nothing to evaluate: give --text or --tasks.")
    if asked.tasks is not None:
        require_harness("--tasks")
        from gblm.evaluate.harness import check_tasks

        check_tasks(asked.tasks)
    served = _served(asked)
    folder = served.folder if served else ModelFolder.open(asked.model)
    dense, note = _baseline(asked, folder)
    if asked.needs_baseline and dense is None:
        raise UsageError(f"a gate needs the dense model to compare with: {note}.")
    home = folder or dense
    if home is None:
        raise UsageError(
            f"{asked.model}: its model is no folder of this machine: give --baseline, whose tokens "
            "are the model's."
        )
    tokenizer = load_tokenizer(home)
    check_same_vocabulary(home, dense)
    length = int(home.text_config.get("max_position_embeddings", 2048))
    _warn_of_long_windows(asked.seq_len, length)
    if served is not None:
        served.connect(home)
    sides, facts = _sides(asked, served, folder, dense)
    logger.info("loaded: %s", " and ".join(sides))
    rows = measure(sides, asked.protocols, tokenizer, progress)
    if asked.tasks is not None:
        from gblm.evaluate.harness import run_tasks

        rows += run_tasks(asked.tasks, sides, tokenizer, length)
    base = None if dense is None else list(sides)[1]
    notes = (f"baseline: {base or 'none'} ({note})",)
    return Record("eval", facts, tuple(rows), base, Verdict(True, notes=notes))


def _sides(
    asked: Evaluation,
    served: ServedSubject | None,
    folder: ModelFolder | None,
    dense: ModelFolder | None,
) -> tuple[dict[str, Subject], dict[str, dict[str, Any]]]:
    """Load the model and its baseline, in one dtype where that can be; give facts of both, too."""
    name = served.name if served else model_name(asked.model)
    subject: Subject = served or open_subject(
        ModelFolder.open(asked.model), asked.dtype, asked.device, asked.backend, asked.seq_len
    )
    sides, facts = {name: subject}, {name: _facts(subject, folder)}
    if dense is not None:
        own = served is not None or folder_kind(dense) == "onnx"
        base = dense.name if dense.name != name else f"{name}, baseline"
        dtype = "auto" if own else subject.dtype
        sides[base] = open_subject(dense, dtype, asked.device, seq_len=asked.seq_len)
        facts[base] = _facts(sides[base], dense)
    return sides, facts


def check_same_vocabulary(folder: ModelFolder, dense: ModelFolder | None) -> None:
    """Refuse a baseline that does not know the model's tokens."""
    sizes = [one.text_config.get("vocab_size") for one in (folder, dense or folder)]
    if sizes[0] != sizes[1]:
        raise InputError(
            f"the model has {sizes[0]} tokens and the baseline {sizes[1]}: give the dense model "
            "that it was made from."
        )


def _warn_of_long_windows(seq_len: int, positions: int) -> None:
    if seq_len > positions:
        logger.warning(
            "windows of %d tokens are longer than the model's max_position_embeddings of %d: it "
            "never learned such places, so perplexity and drift say little; lower --seq-len",
            seq_len, positions,
        )  # fmt: skip


def is_address(model: str) -> bool:
    """Tell whether a model is named by the address of its server."""
    return model.startswith(("http://", "https://"))


def _served(asked: Evaluation) -> ServedSubject | None:
    """Find the model behind an address; None for a folder or hub id."""
    if not is_address(asked.model):
        if asked.api_key:
            raise UsageError("--api-key-file goes with the address of a server only.")
        return None
    if asked.dtype != "auto" or asked.backend:
        raise UsageError("--dtype and --backend do not go with a server, which has its own.")
    require_harness("evaluating a server")
    from gblm.evaluate.harness import ServedSubject

    return ServedSubject(asked.model, asked.api_key)


def _baseline(asked: Evaluation, folder: ModelFolder | None) -> tuple[ModelFolder | None, str]:
    if asked.without_baseline:
        if asked.baseline:
            raise UsageError("--baseline and --no-baseline do not go together.")
        return None, "--no-baseline"
    if asked.baseline:
        return ModelFolder.open(asked.baseline), "--baseline"
    if folder is None:
        return None, "the server does not run on this machine; give --baseline"
    return known_baseline(folder)


def known_baseline(folder: ModelFolder) -> tuple[ModelFolder | None, str]:
    """Find the dense model that a folder was made from, if it says so and it is here.

    Returns:
        The folder or None, and where it comes from or why there is none.
    """
    if folder_kind(folder) == "onnx":
        file = folder.path / ONNX_REPORT
        found = read_json(file) | recall(folder.path) if file.is_file() else {}
        named = found.get("source")
    elif folder.kind == "packed":
        file = folder.path / RECIPE_FILE
        named = read_recipe(file).get("model") if file.is_file() else None
    else:
        return None, "MODEL is a dense folder, which names no model it was made from"
    if not isinstance(named, str):
        return None, f"{file.name} names no source model; give --baseline"
    place = folder.place_of(named)
    if not (place / "config.json").is_file():
        return None, f"{file.name} names {named}, which is not here; give --baseline"
    source = ModelFolder.open(place)
    # An export of a packed folder: on to what that one was made from.
    if source.kind == "packed" and folder_kind(folder) == "onnx":
        return known_baseline(source)
    return source, f"named by {file.name}"


def _facts(subject: Subject, folder: ModelFolder | None) -> dict[str, Any]:
    """Say what a side is: engine, dtype, and the size of its folder if that is here."""
    facts: dict[str, Any] = {"engine": subject.engine, "dtype": subject.dtype}
    return facts | (size_facts(folder) if folder else {})


def size_facts(folder: ModelFolder) -> dict[str, Any]:
    """Measure a model folder as `sizes` does; of an ONNX export only the bytes are known."""
    if folder_kind(folder) == "onnx":
        files = folder.path.glob(f"{ONNX_MODEL}*")
        return {"bytes": sum(file.stat().st_size for file in files if file.is_file())}
    return sizes(folder)
