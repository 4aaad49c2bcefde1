"""PyTorch's own multiplications by 2:4 weights: cuSPARSELt and CUTLASS, and their two layouts.

The only place that calls these operators; most are private to PyTorch, so a test compares their
schemas with what is assumed here. Shapes: torch.sparse.semi_structured.
"""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from gblm.formats import Shape


class Library(ABC):
    """One layout of a 2:4 weight, of 16-bit floats, and the multiplication that reads it."""

    name: ClassVar[str]
    num_tensors: ClassVar[int]
    """How many tensors `pack` makes."""

    @abstractmethod
    def missing(self) -> str | None:
        """Why this PyTorch does not have it, for people; None if it does."""

    @abstractmethod
    def constraints(self, dtype: torch.dtype) -> Any:
        """PyTorch's own: `sparse_min_rows`, `sparse_min_cols`, `dense_min_rows`; None if none."""

    @abstractmethod
    def pack(self, dense: Tensor) -> list[Tensor]:
        """Dense 2:4 weight [out, in] without −0.0, contiguous, on a CUDA device → the layout."""

    @abstractmethod
    def product(self, packed: Sequence[Tensor], x: Tensor, algorithm: int) -> Tensor:
        """Of x [tokens, in] with W.T → [tokens, out]; tokens as the constraints want them."""

    def search(self, packed: Sequence[Tensor], x: Tensor) -> int:
        """The number of the fastest algorithm for x [tokens, in]; measures, waits."""
        return 0

    def refuses(self, shape: Shape, dtype: torch.dtype) -> str | None:
        """Why it cannot multiply by a weight [out, in] of this dtype, for people."""
        if reason := self.missing():
            return reason
        limits = self.constraints(dtype)
        if limits is None:
            return f"{self.name} has no {str(dtype).removeprefix('torch.')}"
        rows, columns = limits.sparse_min_rows, limits.sparse_min_cols
        if shape[0] % rows or shape[1] % columns:
            return f"{self.name} needs multiples of {rows}x{columns}, not {shape[0]}x{shape[1]}"
        return None

    def multiply(self, packed: Sequence[Tensor], x: Tensor, algorithm: int = 0) -> Tensor:
        """x [tokens, in] @ W.T → [tokens, out], for any number of tokens."""
        padded = self.padded(x)
        return self.product(packed, padded, algorithm)[: len(x)]

    def padded(self, x: Tensor) -> Tensor:
        """Tokens up to a number that it takes; the added ones are zero."""
        missing = -len(x) % int(self.constraints(x.dtype).dense_min_rows)
        return functional.pad(x, (0, 0, 0, missing)) if missing else x


class CuSparseLt(Library):
    """NVIDIA's cuSPARSELt, where PyTorch was built with it."""

    name = "cusparselt"
    num_tensors = 1

    def missing(self) -> str | None:
        """See Library.missing."""
        available = torch.backends.cusparselt.is_available()
        return None if available else "this PyTorch has no cuSPARSELt"

    def constraints(self, dtype: torch.dtype) -> Any:
        """See Library.constraints."""
        return torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS.get(dtype)

    def pack(self, dense: Tensor) -> list[Tensor]:
        """Values and metadata in one tensor, whose layout is cuSPARSELt's own."""
        return [torch._cslt_compress(dense)]

    def product(self, packed: Sequence[Tensor], x: Tensor, algorithm: int) -> Tensor:
        """See Library.product. The library itself transposes the result."""
        return torch._cslt_sparse_mm(packed[0], x.t(), transpose_result=True, alg_id=algorithm)

    def search(self, packed: Sequence[Tensor], x: Tensor) -> int:
        """See Library.search. Algorithms are counted anew in each version of the library."""
        return int(torch._cslt_sparse_mm_search(packed[0], x.t(), transpose_result=True))


class Cutlass(Library):
    """The kernels of CUTLASS that PyTorch brings, made for compute capability 8.x."""

    name = "cutlass"
    num_tensors = 2

    def missing(self) -> str | None:
        """See Library.missing."""
        return None if torch.version.cuda else "this PyTorch has no CUDA"

    def constraints(self, dtype: torch.dtype) -> Any:
        """See Library.constraints."""
        return torch.sparse.SparseSemiStructuredTensorCUTLASS._DTYPE_SHAPE_CONSTRAINTS.get(dtype)

    def pack(self, dense: Tensor) -> list[Tensor]:
        """Values and metadata."""
        with warnings.catch_warnings():
            # That its API is a prototype; the schemas are tested.
            warnings.simplefilter("ignore", UserWarning)
            made: Any = torch.sparse.SparseSemiStructuredTensorCUTLASS.from_dense(dense)
        return [made.packed, made.meta]

    def product(self, packed: Sequence[Tensor], x: Tensor, algorithm: int) -> Tensor:
        """See Library.product."""
        return torch._sparse_semi_structured_mm(packed[0], packed[1], x.t()).t().contiguous()


LIBRARIES: tuple[Library, ...] = (CuSparseLt(), Cutlass())
