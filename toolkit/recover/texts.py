"""Texts: the windows that a recovery trains on, and those of other text that it is measured on."""

from __future__ import annotations

import math
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

    The model's own text is held out behind what pruning and training read of it.

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
    # What lies furthest in the model's own text comes first: so it is written in one go.
    own = _own_text_held_out(training, before, folder, tokenizer) if SELF in how.held_out else None
    found = {TRAINING: draw(training, folder, tokenizer)}
    for source in how.held_out:
        if own is not None and source == SELF:
            found[SELF] = own
            continue
        if Path(source).name in found:
            raise UsageError(f"two held-out texts are called {Path(source).name}: rename one.")
        found[Path(source).name] = data.evaluation_windows(
            data.read_documents(source, "held-out"), tokenizer, how.seq_len, HELD_OUT_WINDOWS,
            bos=how.bos,
        )  # fmt: skip
    return found


def _own_text_held_out(
    training: Calibration, before: Calibration | None, folder: Path, tokenizer: Any
) -> Tensor:
    """Draw windows of the model's own text that neither pruning nor training reads."""
    length = own_tokens(training.model_copy(update={"source": SELF, "num_samples": 1}), tokenizer)
    texts = [text for text in (training, before) if text and text.seed == training.seed]
    read = math.ceil(max(own_tokens(text, tokenizer) for text in texts) / length)
    own = {"source": SELF, "num_samples": read + HELD_OUT_WINDOWS}
    return draw(training.model_copy(update=own), folder, tokenizer)[read:]
