"""Perplexity of a model per text, its dense baseline and its drift from it beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from gblm import data, packed
from gblm.evaluate.drift import Drift
from gblm.evaluate.perplexity import Protocol, of_loss
from gblm.evaluate.subjects import ONNX_MODEL, ONNX_REPORT, Subject
from gblm.folder import read_json_object
from gblm.progress import Progress, no_progress

RECIPE = "recipe.json"


def measure(
    subject: Subject,
    dense: Subject | None,
    protocols: Sequence[Protocol],
    tokenizer: Any,
    progress: Progress = no_progress,
) -> list[dict[str, Any]]:
    """A figure per text.

    Args:
        subject: what is judged.
        dense: what it is held against; both see the same tokens.
        protocols: one for each text.
        tokenizer: of both.
        progress: for progress bars.

    Returns:
        For each text "text", "protocol", "tokens_sha256", "tokens", "perplexity"; with a baseline
        "perplexity_baseline", "protocol_baseline", "ratio" and "drift".
    """
    cut = [(protocol, protocol.windows(tokenizer)) for protocol in protocols]
    return [_measure_one(subject, dense, p, windows, progress) for p, windows in cut]


def _measure_one(
    subject: Subject,
    dense: Subject | None,
    protocol: Protocol,
    windows: Tensor,
    progress: Progress,
) -> dict[str, Any]:
    step = progress(f"perplexity, {Path(protocol.source).name}", len(windows))
    drift = Drift()
    loss = loss_dense = 0.0
    count = 0
    for number, window in enumerate(windows):
        # Of a window that overlaps the one before, the tokens that were not scored there.
        new = protocol.stride if protocol.stride and number else len(window) - 1
        counted = slice(len(window) - 1 - min(new, len(window) - 1), None)
        scores = subject.score(window)
        loss -= float(scores.logprobs[counted].double().sum())
        count += len(scores.logprobs[counted])
        if dense is not None:
            other = dense.score(window)
            loss_dense -= float(other.logprobs[counted].double().sum())
            drift.add(scores, other, counted)
        step()
    found: dict[str, Any] = {
        "text": Path(protocol.source).name,
        "protocol": protocol.line(len(windows), subject.dtype, subject.engine),
        "tokens_sha256": data.fingerprint(windows),
        "tokens": count,
        "perplexity": of_loss(loss / count),
    }
    if dense is not None:
        found |= {
            "perplexity_baseline": of_loss(loss_dense / count),
            "protocol_baseline": protocol.line(len(windows), dense.dtype, dense.engine),
            "ratio": of_loss((loss - loss_dense) / count),
            "drift": drift.summary(),
        }
        if drift.of_likeliest:
            found["protocol"] += f", KL over the likeliest {drift.of_likeliest} tokens and the rest"
    return found


def known_baseline(folder: Path) -> tuple[Path | None, str]:
    """The dense model that a folder was made from, if it says so and it is here.

    Returns:
        The folder or None, and where it comes from or why there is none.
    """
    if (folder / ONNX_MODEL).is_file():
        file, key = folder / ONNX_REPORT, "source"
    elif packed.is_packed(folder):
        file, key = folder / RECIPE, "model"
    else:
        return None, "MODEL is a dense folder, which names no model it was made from"
    named = read_json_object(file).get(key) if file.is_file() else None
    if not isinstance(named, str):
        return None, f"{file.name} names no source model; give --baseline"
    for place in (Path(named).expanduser(), folder.parent / named):
        if (place / "config.json").is_file():
            # An export of a packed folder: on to what that one was made from.
            if place.resolve() != folder.resolve() and packed.is_packed(place):
                return known_baseline(place)
            return place, f"named by {file.name}"
    return None, f"{file.name} names {named}, which is not here; give --baseline"
