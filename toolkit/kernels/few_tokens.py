"""What the GPU backends share: few tokens meet the packed weight, many the expanded one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from gblm.kernels.base import Backend
from gblm.sparse.formats import Format, Shape

DTYPES = (torch.bfloat16, torch.float16)


class FewTokens(Backend):
    """Multiplies up to `max_tokens` tokens with the weight as it lies in memory.

    For more, arithmetic is the limit: the weight is expanded into memory that the allocator gives
    to the next linear, and PyTorch multiplies.
    """

    packed = True
    needs = "cuda"
    max_tokens: ClassVar[int]
    max_columns: ClassVar[int]

    def refuses(
        self, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Refuse what the device cannot run, and weights that no device could."""
        return self.refuses_device(device) or self.refuses_weight(fmt, shape, dtype)

    @abstractmethod
    def refuses_device(self, device: torch.device) -> str | None:
        """Say why a device cannot run the kernels, for people; None when it can."""

    def refuses_weight(self, fmt: Format, shape: Shape, dtype: torch.dtype) -> str | None:
        """Say why a weight cannot be served on any device, for people; None when it can."""
        if fmt.name == "dense":
            return "a dense weight has no zeros to leave out"
        if reason := dtype_refusal(dtype):
            return reason
        too_many = shape[1] > self.max_columns
        return f"{shape[1]} columns are more than {self.max_columns}" if too_many else None

    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """Multiply on the current stream, without waiting for the device."""
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
        """Give the dense weight [out, in] in x's dtype, on x's device."""

    @abstractmethod
    def multiply(
        self, x: Tensor, out: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape
    ) -> None:
        """Multiply once with the packed weight.

        Args:
            x: [tokens, in] of 1 to `max_tokens` tokens, `aligned`.
            out: [tokens, out], contiguous; written.
            prepared: what `prepare` returned.
            fmt: the weight's format.
            shape: the weight's [out, in].
        """


def aligned(x: Tensor) -> Tensor:
    """Make x contiguous, at an address that vector loads may take."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def dtype_refusal(dtype: torch.dtype) -> str | None:
    """Say why activations cannot be of this dtype, for people; None when they can."""
    if dtype in DTYPES:
        return None
    return f"activations must be bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
