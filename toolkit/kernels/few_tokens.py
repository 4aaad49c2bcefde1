"""What the GPU backends share: few tokens meet the packed weight, many the expanded one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from gblm.formats import Format, Shape
from gblm.kernels.base import Backend

DTYPES = (torch.bfloat16, torch.float16)


class FewTokens(Backend):
    """Multiplies up to `max_tokens` tokens with the weight as it lies in memory.

    For more, arithmetic is the limit: the weight is expanded into memory that the allocator gives
    to the next linear, and PyTorch multiplies.
    """

    packed = True
    needs = "cuda"
    max_tokens: ClassVar[int]

    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """No host synchronisation, on the current stream."""
        tokens = aligned(x.reshape(-1, shape[1]))
        if len(tokens) > self.max_tokens:
            out = functional.linear(tokens, self.expand(x, prepared, fmt, shape))
        else:
            out = x.new_empty((len(tokens), shape[0]))
            if out.numel():
                self.multiply(tokens, out, prepared, fmt, shape)
        return out.reshape(*x.shape[:-1], shape[0])

    @abstractmethod
    def expand(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """The dense weight [out, in] where and as x is."""

    @abstractmethod
    def multiply(
        self, x: Tensor, out: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape
    ) -> None:
        """One multiplication with the packed weight.

        Args:
            x: [tokens, in] of 1 to `max_tokens` tokens, `aligned`.
            out: [tokens, out], contiguous; written.
            prepared: what `prepare` returned.
            fmt: the weight's format.
            shape: [out, in] of the weight.
        """


def aligned(x: Tensor) -> Tensor:
    """Contiguous, and at an address that vector loads may take."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def dtype_refusal(dtype: torch.dtype) -> str | None:
    """Why activations cannot be of this dtype, for people; None when they can."""
    if dtype in DTYPES:
        return None
    return f"activations must be bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"


def weight_refusal(fmt: Format, shape: Shape, dtype: torch.dtype, most: int) -> str | None:
    """Why kernels for any mask cannot serve a weight [out, in], for people; None when they can.

    Args:
        fmt: its format.
        shape: [out, in].
        dtype: of the activations.
        most: columns.
    """
    if fmt.name == "dense":
        return "a dense weight has no zeros to leave out"
    if reason := dtype_refusal(dtype):
        return reason
    return f"{shape[1]} columns are more than {most}" if shape[1] > most else None
