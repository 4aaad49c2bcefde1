"""Texts: the windows that a recovery trains on, and those of other text that it is measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from gblm import data
from gblm.calibrate.text import SELF, count_windows, draw
from gblm.errors import UsageError
from gblm.recipe import Recovering
from gblm.recover.needs import HELD_OUT_WINDOWS

TRAINING = "training"


def read_texts(how: Recovering, folder: Path, tokenizer: Any, tokens: int) -> dict[str, Tensor]:
    """Draw the windows of training, and the held-out ones of each text by its name.

    Args:
        how: names the texts.
        folder: of the dense model, which may write some of them.
        tokenizer: of the model.
        tokens: how many are trained on.

    Returns:
        Token ids, [windows, seq_len] int64 each; TRAINING comes first.

    Raises:
        GblmError: a text cannot be read or is too short, or two have one name.
    """
    count = max(how.batch_size, tokens // how.seq_len)
    # First what lies furthest in the model's own text: so it is written in one go.
    own = _behind_the_trained(how, folder, tokenizer, count) if SELF in how.held_out else None
    found = {TRAINING: draw(how.text, folder, tokenizer, count, how.seq_len, how.seed, how.bos)}
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


def _behind_the_trained(how: Recovering, folder: Path, tokenizer: Any, count: int) -> Tensor:
    """Give the windows of the model's own text that follow those that are trained on."""
    trained = count_windows(how.text, count).get(SELF, 0)
    windows = trained + HELD_OUT_WINDOWS
    return draw(SELF, folder, tokenizer, windows, how.seq_len, how.seed, how.bos)[trained:]
