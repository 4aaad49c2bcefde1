"""PyTorch's 2:4 libraries as backends of the check, so that each is compared and timed by itself.

The product never chooses these: `semi_structured` takes a library only where it is the fastest.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gblm.formats import Format, Parts, Shape
from gblm.kernels import Backend
from gblm.kernels.cuda.libraries import LIBRARIES, Library

LIBRARY_NAMES = tuple(library.name for library in LIBRARIES)


class LibraryBackend(Backend):
    """One library's layout in memory; its fastest algorithm for each number of tokens."""

    packed = True

    def __init__(self, library: Library) -> None:
        self.name, self._library = library.name, library  # type: ignore[misc]
        self._algorithms: dict[tuple[Shape, torch.dtype, int], int] = {}

    def refuses(
        self, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """What the library refuses, and codes, which it would hold as floats."""
        if str(fmt.pattern) != "2:4" or not fmt.values.is_float:
            return "it takes 2:4 weights of floats"
        return self._library.refuses(shape, dtype)

    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """The library's layout."""
        return self._library.pack(fmt.expand(parts, dtype).contiguous())

    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """The first call with a number of tokens searches the algorithm, and waits."""
        key = (shape, x.dtype, len(x))
        if key not in self._algorithms:
            self._algorithms[key] = self._library.search(prepared, self._library.padded(x))
        return self._library.multiply(prepared, x, self._algorithms[key])


def library_backends() -> dict[str, Backend]:
    """All of them."""
    return {library.name: LibraryBackend(library) for library in LIBRARIES}
