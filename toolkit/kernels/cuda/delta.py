"""delta: weights of any mask, by their kept values alone; for the few tokens of decoding.

Integer values are multiplied out when the model is loaded, once rounded to the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gblm.formats import Format, Parts, Shape
from gblm.kernels.cuda import device as cuda
from gblm.kernels.cuda.deltas import MAX_COLUMNS, pack_deltas, padded_columns
from gblm.kernels.cuda.device import THREADS, Device, device_of
from gblm.kernels.cuda.source import Variant
from gblm.kernels.few_tokens import FewTokens, aligned, weight_refusal

MAX_TOKENS = 8
WARPS = THREADS // 32
MAX_BLOCKS_PER_SM = 8


class Delta(FewTokens):
    """4-bit distances in memory; more than 8 tokens meet the expanded weight."""

    name = "delta"
    max_tokens = MAX_TOKENS

    def __init__(self, device_of: Callable[[Tensor], Device] = device_of) -> None:
        """`device_of` finds where activations lie; tests give it an emulated device."""
        self._device_of = device_of

    def refuses(
        self, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Other devices, dense weights, other activations, and very long rows."""
        return cuda.refusal(device) or self.refuses_weight(fmt, shape, dtype)

    def refuses_weight(self, fmt: Format, shape: Shape, dtype: torch.dtype) -> str | None:
        """What does not depend on the device."""
        return weight_refusal(fmt, shape, dtype, MAX_COLUMNS)

    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """See `pack_deltas`."""
        return pack_deltas(fmt.expand(parts, dtype), fmt.mask(parts))

    def expand(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """See FewTokens.expand."""
        dense = x.new_zeros(shape)
        compiled = Variant("delta", (("BF16", int(x.dtype == torch.bfloat16)), ("TOKENS", 1)))
        grid = -(-shape[0] // WARPS)
        self._device_of(x).launch(compiled, "scatter", grid, [*prepared, dense, *shape])
        return dense

    def multiply(
        self, x: Tensor, out: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape
    ) -> None:
        """See cuda/delta.cu; of long rows a launch takes some tokens."""
        step = tokens_at_once(self._device_of(x), shape[1])
        for start in range(0, len(x), step):
            piece = slice(start, start + step)
            self._launch(x[piece], out[piece], prepared, shape)

    def _launch(self, x: Tensor, out: Tensor, prepared: Sequence[Tensor], shape: Shape) -> None:
        device, tokens, padded = self._device_of(x), len(x), padded_columns(shape[1])
        blocks = 1 << (tokens - 1).bit_length()
        defines = (("BF16", int(x.dtype == torch.bfloat16)), ("TOKENS", blocks))
        shared = 2 * padded * blocks
        resident = max(1, min(MAX_BLOCKS_PER_SM, device.max_shared // shared))
        grid = min(-(-shape[0] // WARPS), device.num_sms * resident)
        arguments: list[Tensor | int] = [*prepared, aligned(x), out, tokens, *shape, padded]
        device.launch(Variant("delta", defines), "delta", grid, arguments, shared)


def tokens_at_once(device: Device, columns: int) -> int:
    """How many tokens a launch takes, so that they fit into shared memory: 1, 2, 4 or 8."""
    fits = max(1, device.max_shared // (2 * padded_columns(columns)))
    return min(MAX_TOKENS, 1 << (fits.bit_length() - 1))
