"""The text of the CUDA kernels, and the variants of it that are compiled."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
PRELUDE = "ptx.cuh"


@dataclass(frozen=True)
class Variant:
    """One compilation of one file.

    Attributes:
        file: without ".cu".
        defines: name and value of each macro; the head of the file explains them.
    """

    file: str
    defines: tuple[tuple[str, int], ...]

    @property
    def label(self) -> str:
        """For people, such as "mma_sp BF16=1 TOKENS=2"."""
        return " ".join([self.file, *(f"{name}={value}" for name, value in self.defines)])

    @property
    def options(self) -> list[str]:
        """The macros, as the compiler's command line has them."""
        return [f"-D{name}={value}" for name, value in self.defines]

    def text(self, prelude: str | None = None) -> str:
        """The source; another prelude than that of CUDA lets it run elsewhere."""
        return (read(PRELUDE) if prelude is None else prelude) + read(f"{self.file}.cu")


@cache
def read(name: str) -> str:
    """The text of a file beside this one."""
    return (FOLDER / name).read_text(encoding="utf-8")
