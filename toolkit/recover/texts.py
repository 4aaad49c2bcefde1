"""Texts: the windows that a recovery trains on, and those of other text that it is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from gblm import data
from gblm.calibrate.text import SELF, draw, own_tokens
from gblm.errors import UsageError
from gblm.recipe import Calibration, Recovering
from gblm.recover.needs import HELD_OUT_WINDOWS

TRAINING = "training"


def read_texts(
    how: Recovering, before: Calibration | None, folder: Path, tokenizer: Any, tokens: int
) -> dict[str, Tensor]:
    """Draw the windows of training, and the held-out ones of each text by its name.

    Of the model's own text comes first what pruning read, then training's, then the held-out one.

    Args:
        how: names the texts.
        before: what pruning read; None if it read nothing.
        folder: of the dense model, which may write some of them.
        tokenizer: of the model.
        tokens: how many are trained on.

    Returns:
        Token ids, [windows, seq_len] int64 each; TRAINING comes first.

    Raises:
        GblmError: a text cannot be read or is too short, or two have one name.
    """
    count = max(how.batch_size, tokens // how.seq_len)
    training = Calibration(
        source=how.text, num_samples=count, seq_len=how.seq_len, seed=how.seed, bos=how.bos
    )
    own = training.model_copy(update={"source": SELF, "num_samples": HELD_OUT_WINDOWS})
    read = own_tokens(before, tokenizer) if before and before.seed == how.seed else 0
    trained = read + own_tokens(training, tokenizer)
    # First what lies furthest in the model's own text: so it is written in one go.
    last = draw(own, folder, tokenizer, trained) if SELF in how.held_out else None
    found = {TRAINING: draw(training, folder, tokenizer, read)}
    for source in how.held_out:
        if last is not None and source == SELF:
            found[SELF] = last
            continue
        if Path(source).name in found:
            raise UsageError(f"two held-out texts are called {Path(source).name}: rename one.")
        found[Path(source).name] = data.evaluation_windows(
            data.read_documents(source, "held-out"), tokenizer, how.seq_len, HELD_OUT_WINDOWS,
            bos=how.bos,
        )  # fmt: skip
    return found
