"""Search: make the best configurations of a budget for real, and measure what was predicted.

The folder holds search.json, which is written after every step, and a packed model for each
candidate until the best is known. The same call goes on where an earlier one was cut off.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gblm.budget.answer import Question, answer
from gblm.budget.figure import draw
from gblm.checkpoint.durable import write_object
from gblm.checkpoint.packed_folder import RECIPE_FILE
from gblm.checkpoint.reader import Reader
from gblm.checkpoint.writer import folder_sha256
from gblm.errors import InputError, MachineError
from gblm.evaluate.perplexity import Protocol
from gblm.evaluate.run import Evaluation, run_evaluation
from gblm.folder import read_json_object, resolve
from gblm.progress import Progress, no_progress
from gblm.provenance import provenance
from gblm.prune import Output, prune
from gblm.recipe import Recipe

logger = logging.getLogger(__name__)
STATE, FIGURE = "search.json", "search.svg"


@dataclass(frozen=True)
class Search:
    """What is searched for, and where.

    Attributes:
        question: the model and its budget.
        folder: to be made, or that of an earlier call with the same question and protocol.
        limit: candidates that hold the budget, the best predicted ones; dense models come on top.
        protocol: of the perplexity.
        keep_all: keep every packed model, not the best alone.
        command: that asked for it, for the record.
    """

    question: Question
    folder: Path
    limit: int = 4
    protocol: Protocol = field(default_factory=lambda: Protocol(seq_len=512, max_windows=32))
    keep_all: bool = False
    command: str | None = None


def search(wanted: Search, progress: Progress = no_progress) -> dict[str, Any]:
    """Prune, pack and measure the candidates; what is finished is not done again.

    Args:
        wanted: see Search.
        progress: for progress bars.

    Returns:
        What search.json holds: "baseline": of the unpruned model. "candidates": rows of `answer`
        with "measured": "perplexity", "ratio", "bits_per_weight", "bytes"; the lowest perplexity
        first. "best": the name and folder of the best one that holds the budget. "figure": the file
        or None.

    Raises:
        InputError: the folder holds something else.
        GblmError: what `answer`, `prune` and `run_evaluation` raise.
    """
    state = _open(wanted, progress)
    if wanted.command is not None:
        # That of the last call: a larger limit adds candidates to those of the first.
        state["command"] = wanted.command
    if "baseline" not in state:
        found = _evaluate(wanted, wanted.question.recipe.model, progress)
        state["baseline"] = {key: found[key] for key in ("perplexity", "protocol", "tokens_sha256")}
        _save(wanted, state)
    for row in _candidates(state["answer"]["rows"], wanted.limit):
        if row["name"] in state["measured"]:
            logger.info("%s: measured already", row["name"])
            continue
        state["measured"][row["name"]] = _measure(wanted, row, state["baseline"], progress)
        _save(wanted, state)
    result = _result(wanted, state)
    if not wanted.keep_all:
        _remove_others(wanted, state, result["best"]["folder"])
    drawn = draw(result, wanted.folder / FIGURE)
    return result | {"figure": str(wanted.folder / FIGURE) if drawn else None}


def _open(wanted: Search, progress: Progress) -> dict[str, Any]:
    """The state of an earlier call, or a new one with the answer that names the candidates."""
    path, inputs = wanted.folder / STATE, _inputs(wanted)
    if path.exists():
        state = read_json_object(path)
        old = state.get("inputs")
        if not isinstance(old, dict) or old != inputs:
            known = old if isinstance(old, dict) else {}
            changed = ", ".join(key for key in inputs if known.get(key) != inputs[key])
            raise InputError(
                f"{path} is of another search ({changed} differ): choose another --output."
            )
        return state
    if wanted.folder.exists() and any(wanted.folder.iterdir()):
        raise InputError(f"{wanted.folder} is not empty, and no search: choose another --output.")
    try:
        wanted.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"folder {wanted.folder} cannot be made: {error}") from error
    state = {
        "kind": "search",
        "provenance": provenance(),
        "inputs": inputs,
        "answer": answer(wanted.question, progress),
        "measured": {},
    }
    _save(wanted, state)
    return state


def _inputs(wanted: Search) -> dict[str, Any]:
    """What must be the same for a search to go on, as JSON gives it back."""
    question = wanted.question
    with Reader(resolve(question.recipe.model)) as reader:
        sha256 = folder_sha256(reader.folder, {"config.json", *reader.files})
    return {
        "model_sha256": sha256,
        "recipe": question.recipe.to_dict(),
        "budget": str(question.budget),
        "values": list(question.wanted.values),
        "patterns": list(question.wanted.patterns),
        "protocol": asdict(wanted.protocol),
    }


def _candidates(rows: list[dict[str, Any]], limit: int) -> list[dict[str, Any]]:
    """The best predicted ones, and the dense models that are made uniformly."""
    best = [row for row in rows if row["fits"]][:limit]
    return best + [row for row in rows if row["dense"] and row not in best]


def _measure(
    wanted: Search, row: Mapping[str, Any], baseline: Mapping[str, Any], progress: Progress
) -> dict[str, Any]:
    """Make one candidate, unless it is there, and measure its perplexity."""
    folder, recipe = wanted.folder / slug(row["name"]), Recipe.from_dict(row["recipe"])
    if folder.exists():
        if not (folder / RECIPE_FILE).exists() or Recipe.from_file(folder / RECIPE_FILE) != recipe:
            raise InputError(f"{folder} is no candidate of this search: remove it.")
    else:
        logger.info("%s: %s", row["name"], row["what"])
        prune(recipe, Output(folder), progress)
    report = read_json_object(folder / "sparsity_report.json")
    found = _evaluate(wanted, folder, progress)
    return {
        "perplexity": found["perplexity"],
        "ratio": found["perplexity"] / baseline["perplexity"],
        "bits_per_weight": report["bits_per_weight"],
        "bytes": report["bytes_packed"],
        "sparsity": report["sparsity"],
    }


def _evaluate(wanted: Search, model: str | Path, progress: Progress) -> dict[str, Any]:
    device = wanted.question.recipe.device
    asked = Evaluation(str(model), (wanted.protocol,), without_baseline=True, device=device)
    return run_evaluation(asked, progress)


def _result(wanted: Search, state: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        row | {"measured": state["measured"][row["name"]]}
        for row in state["answer"]["rows"]
        if row["name"] in state["measured"]
    ]
    rows.sort(key=lambda row: float(row["measured"]["perplexity"]))
    for row in rows:
        row["on_frontier"] = not any(_beats(other["measured"], row["measured"]) for other in rows)
    best = next(row for row in rows if row["fits"])
    return {
        **{key: value for key, value in state.items() if key not in ("answer", "measured")},
        **{key: state["answer"][key] for key in ("budget", "pass", "verdict")},
        "candidates": rows,
        "best": {"name": best["name"], "folder": str(wanted.folder / slug(best["name"]))},
    }


def _beats(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    """Whether one is as small and as good, and one of them strictly."""
    pairs = [(one[key], other[key]) for key in ("perplexity", "bits_per_weight")]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


def _remove_others(wanted: Search, state: Mapping[str, Any], best: str) -> None:
    """Packed models that have been measured and are not the best."""
    for name in state["measured"]:
        folder = wanted.folder / slug(name)
        if str(folder) != best and (folder / RECIPE_FILE).exists():
            shutil.rmtree(folder)


def _save(wanted: Search, state: dict[str, Any]) -> None:
    write_object(wanted.folder / STATE, state)


def slug(name: str) -> str:
    """A configuration's name as that of a folder."""
    return re.sub(r"[^a-z0-9.]+", "-", name.replace(":", "of").lower()).strip("-")
