"""Run a search: make the best candidates of a budget for real, and measure what was predicted.

The folder holds search.json, a record that is written after every step, and a packed model for each
candidate until the best is known. The same call goes on where an earlier one was cut off.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gblm.errors import InputError, MachineError
from gblm.evaluate.perplexity import Protocol
from gblm.evaluate.run import Evaluation, run_evaluation
from gblm.files import read_json, write_json
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import RECIPE_FILE
from gblm.model.reader import Reader
from gblm.progress import Progress, no_progress
from gblm.provenance import provenance
from gblm.prune import Output, prune
from gblm.recipe import Recipe
from gblm.record import Record, Row, Verdict, this_command
from gblm.search.candidates import Question, answer

logger = logging.getLogger(__name__)
STATE, UNPRUNED, METRIC = "search.json", "unpruned", "perplexity"
PREDICTED = ("bits_per_weight", "bytes", "loss", "ratio")
FACTS = ("dense", "fits", "what", "recipe")


@dataclass(frozen=True)
class Measuring:
    """This says where candidates are made, how many of them, and what they are measured on.

    Attributes:
        folder: to be made, or that of an earlier call with the same question and protocol.
        limit: candidates that hold the budget, the best predicted ones; dense models come on top.
        protocol: of the perplexity.
    """

    folder: Path
    limit: int = 4
    protocol: Protocol = field(default_factory=lambda: Protocol(seq_len=512, max_windows=32))


def search(question: Question, how: Measuring, progress: Progress = no_progress) -> Record:
    """Prune, pack and measure the candidates; what is finished is not done again.

    Args:
        question: the model and its budget.
        how: where, and on what.
        progress: for progress bars.

    Returns:
        What search.json holds. Its sides are the unpruned model and the candidates of `answer`,
        those that hold the budget and are predicted best first; a side that has been measured has
        its real "bytes", "bits_per_weight" and "sparsity", and a row with its perplexity.

    Raises:
        InputError: the folder holds something else.
        GblmError: what `answer`, `prune` and `run_evaluation` raise.
    """
    record = _open(question, how, progress)
    device = question.recipe.device
    if not is_measured(record, UNPRUNED):
        row = _perplexity(UNPRUNED, question.recipe.model, how.protocol, device, progress)
        record = _save(how, record, row, {})
    for name in _chosen(record.sides, how.limit):
        if is_measured(record, name):
            logger.info("%s: measured already", name)
            continue
        folder = how.folder / slug(name)
        facts = _make(folder, record.sides[name], progress)
        row = _perplexity(name, folder, how.protocol, device, progress)
        record = _save(how, record, row, facts)
    _remove_others(how, record)
    return record


def is_measured(record: Record, side: str) -> bool:
    """Tell whether a side of a search has been measured."""
    return any(row.side == side for row in record.rows)


def ranked(record: Record) -> list[str]:
    """Name the measured candidates, the lowest perplexity first."""
    found = [(_value(row), row.side) for row in record.rows if row.side != UNPRUNED]
    return [side for _, side in sorted(found)]


def best(record: Record) -> str:
    """Name the measured candidate of the lowest perplexity that holds the budget."""
    return next(side for side in ranked(record) if record.sides[side]["fits"])


def slug(name: str) -> str:
    """Make a folder's name of a candidate's."""
    return re.sub(r"[^a-z0-9.]+", "-", name.replace(":", "of").lower()).strip("-")


def _open(question: Question, how: Measuring, progress: Progress) -> Record:
    """Read the record of an earlier call, or make one with the answer that names the candidates."""
    path, asked = how.folder / STATE, _inputs(question, how)
    if path.exists():
        record = Record.read(path)
        before = record.provenance.get("search")
        if before != asked:
            known = before if isinstance(before, dict) else {}
            changed = ", ".join(key for key in asked if known.get(key) != asked[key])
            raise InputError(
                f"{path} is of another search ({changed} differ): choose another --output."
            )
        # A larger limit adds candidates to those of an earlier call.
        return replace(record, command=this_command())
    if how.folder.exists() and any(how.folder.iterdir()):
        raise InputError(f"{how.folder} is not empty, and no search: choose another --output.")
    try:
        how.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(f"folder {how.folder} cannot be made: {error}") from error
    found = answer(question, progress)
    sides = {
        row["name"]: {key: row[key] for key in FACTS}
        | {"predicted": {key: row[key] for key in PREDICTED}}
        for row in found["rows"]
    }
    return Record(
        kind="search",
        sides={UNPRUNED: {}} | sides,
        rows=(),
        baseline=UNPRUNED,
        verdict=Verdict(True, notes=(found["verdict"], *found["notes"])),
        provenance=provenance() | {"search": asked, "pass": found["pass"]},
    )


def _inputs(question: Question, how: Measuring) -> dict[str, Any]:
    """Give what must be the same for a search to go on, as JSON gives it back."""
    with Reader(ModelFolder.open(question.recipe.model)) as reader:
        sha256 = reader.sha256()
    return {
        "model_sha256": sha256,
        "recipe": question.recipe.to_dict(),
        "budget": str(question.budget),
        "values": list(question.space.values),
        "patterns": list(question.space.patterns),
        "protocol": asdict(how.protocol),
    }


def _chosen(sides: Mapping[str, Mapping[str, Any]], limit: int) -> list[str]:
    """Name the best predicted candidates, and the dense models that are made uniformly."""
    candidates = {name: facts for name, facts in sides.items() if name != UNPRUNED}
    first = [name for name, facts in candidates.items() if facts["fits"]][:limit]
    return first + [n for n, facts in candidates.items() if facts["dense"] and n not in first]


def _make(folder: Path, facts: Mapping[str, Any], progress: Progress) -> dict[str, Any]:
    """Make one candidate, unless it is there, and give what its report says."""
    recipe = Recipe.from_dict(facts["recipe"])
    if folder.exists():
        if not (folder / RECIPE_FILE).exists() or Recipe.from_file(folder / RECIPE_FILE) != recipe:
            raise InputError(f"{folder} is no candidate of this search: remove it.")
    else:
        logger.info("%s: %s", folder.name, facts["what"])
        prune(recipe, Output(folder), progress)
    report = read_json(folder / "sparsity_report.json")
    return {
        "bytes": report["bytes_packed"],
        "bits_per_weight": report["bits_per_weight"],
        "sparsity": report["sparsity"],
    }


def _perplexity(
    side: str, model: str | Path, protocol: Protocol, device: str, progress: Progress
) -> Row:
    asked = Evaluation(str(model), (protocol,), without_baseline=True, device=device)
    return replace(run_evaluation(asked, progress).rows[0], side=side)


def _save(how: Measuring, record: Record, row: Row, facts: Mapping[str, Any]) -> Record:
    """Add a measured side, and write the record so that no kill can damage it."""
    sides = {**record.sides, row.side: {**record.sides[row.side], **facts}}
    record = replace(record, sides=sides, rows=(*record.rows, row))
    write_json(how.folder / STATE, record.as_json())
    return record


def _value(row: Row) -> float:
    return math.inf if row.value is None else row.value


def _remove_others(how: Measuring, record: Record) -> None:
    """Remove packed models that have been measured and are not the best."""
    for name in ranked(record):
        folder = how.folder / slug(name)
        if name != best(record) and (folder / RECIPE_FILE).exists():
            shutil.rmtree(folder)
