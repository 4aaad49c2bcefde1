"""Budget: how many bits or bytes a packed model may take."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from gblm.errors import UsageError

Unit = Literal["bits", "bytes"]
WORDS: dict[str, tuple[Unit, float]] = {
    "bit": ("bits", 1), "bits": ("bits", 1),
    "kb": ("bytes", 1e3), "mb": ("bytes", 1e6), "gb": ("bytes", 1e9), "tb": ("bytes", 1e12),
    "kib": ("bytes", 2**10), "mib": ("bytes", 2**20), "gib": ("bytes", 2**30),
    "tib": ("bytes", 2**40),
}  # fmt: skip


@dataclass(frozen=True)
class Budget:
    """A budget bounds a packed model; str() gives the text it was read from.

    "bits" are counted per weight of the linears to prune, with masks and scales; "bytes" are those
    of all tensors of the packed folder.
    """

    unit: Unit
    amount: float
    text: str

    def __str__(self) -> str:
        return self.text

    def limit(self, weights: int, rest: int) -> float:
        """Give the bytes that all packed linears together may take.

        Args:
            weights: how many weights the linears have.
            rest: bytes of the packed folder's other tensors.
        """
        return self.amount * weights / 8 if self.unit == "bits" else self.amount - rest


def parse_budget(text: str) -> Budget:
    """Read `3.5bits`, `150MB`, `2.1GB` or `1.9GiB`.

    Raises:
        UsageError: the text is none of these, or the amount is not above 0.
    """
    match = re.fullmatch(r"(\d{1,12}(?:\.\d{1,6})?|\.\d{1,6})\s*([A-Za-z]{2,4})", text.strip())
    word = WORDS.get(match[2].lower()) if match else None
    if match is None or word is None:
        raise UsageError(
            f"budget {text[:40]!r} is unknown: give bits per pruned weight (3.5bits) or bytes of "
            "the packed model (150MB, 2.1GB)."
        )
    amount = float(match[1]) * word[1]
    if amount <= 0:
        raise UsageError(f"budget {text[:40]!r}: the amount must be above 0.")
    return Budget(word[0], amount, text.strip())
