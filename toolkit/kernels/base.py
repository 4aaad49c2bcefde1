"""Backend: one implementation of x @ W.T for packed weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from gblm.formats import Format, Parts, Shape


class Backend(ABC):
    """Prepares the parts of one weight once, then multiplies with them."""

    name: ClassVar[str]
    packed: ClassVar[bool]
    """Whether the weight stays packed in memory."""
    needs: ClassVar[str] = "cpu"
    """Type of the devices that it runs on; "cpu" ones that refuse no device run on any."""
    own_op: ClassVar[bool] = False
    """Whether `linear` calls one PyTorch op and nothing else, so that tracing needs no other."""

    @abstractmethod
    def refuses(
        self, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """None when it can serve such a weight; else the reason, for people.

        Args:
            fmt: its format.
            shape: [out, in].
            dtype: of the activations.
            device: where it will be used.
        """

    def holds(self, fmt: Format) -> str | None:
        """As what its memory holds the values, for people; None: as they are stored."""
        return None

    @abstractmethod
    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """Disk layout → kernel layout, once, at load.

        Args:
            fmt: the weight's format.
            parts: as stored; floating values already in the activations' dtype.
            shape: [out, in] of the weight.
            dtype: of the activations. Integer values are multiplied in it.
        """

    @abstractmethod
    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """x [..., in] @ W.T → [..., out].

        Args:
            x: the activations, in the dtype that `prepare` was told.
            prepared: what `prepare` returned.
            fmt: the weight's format.
            shape: [out, in] of the weight.
        """
