"""Backend: one implementation of x @ W.T for packed weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gblm.sparse.formats import Format, Parts, Shape


class Backend(ABC):
    """Prepares the parts of one weight once, then multiplies with them."""

    name: ClassVar[str]
    packed: ClassVar[bool]
    """Whether the weight stays packed in memory."""
    needs: ClassVar[str] = "cpu"
    """The type of device that it was written for; "cpu" ones may run on any device."""
    formats: ClassVar[tuple[str, ...]] = ()
    """Names of the formats whose parts it knows; none = it asks the format to expand them."""
    own_op: ClassVar[bool] = False
    """Whether `linear` calls one PyTorch op and nothing else, so that tracing needs no other."""

    def refuses(
        self, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Say why it cannot serve such a weight, for people; None when it can.

        Args:
            fmt: the weight's format.
            shape: the weight's [out, in].
            dtype: the activations' dtype.
            device: where the weight will be used.
        """
        return None

    @abstractmethod
    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """Turn the disk layout into the kernel's, once, when a model is loaded.

        Args:
            fmt: the weight's format.
            parts: the stored tensors; floating values already in the activations' dtype.
            shape: the weight's [out, in].
            dtype: the activations' dtype, in which integer values are multiplied.
        """

    @abstractmethod
    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """Multiply x [..., in] @ W.T to [..., out].

        Args:
            x: the activations, in the dtype that `prepare` was told.
            prepared: what `prepare` returned.
            fmt: the weight's format.
            shape: the weight's [out, in].
        """
