"""mma_sp: 2:4 weights that the sparse tensor core of NVIDIA GPUs reads compressed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gblm.formats import Format, Parts, Shape
from gblm.kernels.cuda import device as cuda
from gblm.kernels.cuda.device import THREADS, Device, device_of
from gblm.kernels.cuda.source import Variant
from gblm.kernels.cuda.tiles import ROWS, STEP, pack_tiles, padded, scale_group
from gblm.kernels.few_tokens import FewTokens, dtype_refusal

MAX_TOKENS = 64
# Above, activations are rearranged first: the loads of more fragments would fill the L1 cache.
MAX_DIRECT = 16
WARPS = THREADS // 32
VALUES = {"float": 16, "int8": 8, "int4": 4, "uint4": 14, "fp8": 28}


class SparseTensorCore(FewTokens):
    """Tiles in memory; bfloat16 or float16 activations on compute capability 8.0 to 12.1."""

    name = "mma_sp"
    max_tokens = MAX_TOKENS

    def __init__(self, device_of: Callable[[Tensor], Device] = device_of) -> None:
        """`device_of` finds where activations lie; tests give it an emulated device."""
        self._device_of = device_of

    def refuses(
        self, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Other devices, patterns and activations."""
        return cuda.refusal(device) or self.refuses_weight(fmt, dtype)

    def refuses_weight(self, fmt: Format, dtype: torch.dtype) -> str | None:
        """What does not depend on the device."""
        if str(fmt.pattern) != "2:4":
            return f"the pattern must be 2:4, not {fmt.pattern}"
        return dtype_refusal(dtype)

    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """Values, metadata and scales: see `pack_tiles`."""
        return pack_tiles(fmt, parts, shape)

    def expand(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """See FewTokens.expand."""
        rows, columns = padded(fmt, shape)
        dense = x.new_empty(shape)
        grid = -(-(rows // ROWS) * (columns // STEP) // WARPS)
        arguments: list[Tensor | int] = [*prepared, dense, *shape]
        self._device_of(x).launch(variant(fmt, shape, x.dtype, 1), "expand", grid, arguments)
        return dense

    def multiply(
        self, x: Tensor, out: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape
    ) -> None:
        """See cuda/mma_sp.cu; more than 16 tokens are rearranged first."""
        device, tokens = self._device_of(x), len(x)
        compiled = variant(fmt, shape, x.dtype, tokens)
        rows, columns = padded(fmt, shape)
        if tokens > MAX_DIRECT:
            pieces = columns // STEP * 2 * token_blocks(tokens)
            fragments = x.new_empty(pieces * 32 * 8)
            grid = -(-pieces * 32 // THREADS)
            device.launch(compiled, "repack", grid, [x, fragments, tokens, shape[1]])
            x = fragments
        device.launch(compiled, "mma_sp", rows // ROWS, [*prepared, x, out, tokens, *shape])


def token_blocks(tokens: int) -> int:
    """Blocks of eight tokens, of the sizes that are compiled: 1, 2, 4, 8."""
    return 1 << (max(-(-tokens // 8), 1) - 1).bit_length()


def variant(fmt: Format, shape: Shape, dtype: torch.dtype, tokens: int) -> Variant:
    """What is compiled for a weight [out, in] and so many tokens."""
    defines = {
        "BF16": int(dtype == torch.bfloat16),
        "TOKENS": token_blocks(tokens),
        "VALUES": VALUES[fmt.values.kind],
        "GROUP": scale_group(fmt, shape),
        "TAIL": int(padded(fmt, shape)[1] != shape[1]),
        "REPACKED": int(tokens > MAX_DIRECT),
    }
    return Variant("mma_sp", tuple(defines.items()))
