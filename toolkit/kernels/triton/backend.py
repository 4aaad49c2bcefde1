"""triton: any packed weight, on GPUs that Triton compiles for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from gblm.formats import Format, Parts, Shape
from gblm.kernels.cuda.device import OLDEST
from gblm.kernels.few_tokens import FewTokens, weight_refusal
from gblm.kernels.triton.launch import ADDED, COMPILER, DENSE, MAX_TOKENS, Stored, blocks, sized
from gblm.kernels.triton.layout import MAX_COLUMNS, arrays

OLDEST_TRITON = (3, 6)


class Triton(FewTokens):
    """The parts as they are in memory; bfloat16 or float16 activations."""

    name = "triton"
    max_tokens = MAX_TOKENS

    def __init__(self, units_of: Callable[[Tensor], int] | None = None) -> None:
        """`units_of` counts the compute units of a tensor's device; tests give their own."""
        self._units_of = units_of or compute_units

    def refuses(
        self, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """Other devices, no Triton, dense weights, other activations, and very long rows."""
        return refusal(device) or self.refuses_weight(fmt, shape, dtype)

    def refuses_weight(self, fmt: Format, shape: Shape, dtype: torch.dtype) -> str | None:
        """What does not depend on the device."""
        return weight_refusal(fmt, shape, dtype, MAX_COLUMNS)

    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """See `arrays`."""
        return list(arrays(fmt, parts, shape))

    def expand(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """See FewTokens.expand."""
        from gblm.kernels.triton import kernels

        stored, dense = Stored.of(fmt, shape), x.new_empty(shape)
        rows, columns = sized(DENSE, stored)
        grid = (-(-shape[0] // rows), -(-shape[1] // columns))
        options = stored.options(shape, rows, columns) | {"FLOAT": kernels.FLOATS[x.dtype]}
        with torch.cuda.device_of(x):
            kernels.expand[grid](*prepared, dense, *shape, **options, **COMPILER)
        return dense

    def multiply(
        self, x: Tensor, out: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape
    ) -> None:
        """See triton/kernels.py; what shares of the columns give is added up by a second kernel."""
        from gblm.kernels.triton import kernels

        stored = Stored.of(fmt, shape)
        block = blocks(stored, shape, len(x), self._units_of(x))
        shares = out
        if block.split > 1:
            shares = out.new_empty((block.split, *out.shape), dtype=torch.float32)
        grid = (-(-shape[0] // block.rows), block.split)
        options = stored.options(shape, block.rows, block.columns)
        options |= {"TOKENS": block.tokens, "SPLIT": block.split, "FLOAT": kernels.FLOATS[x.dtype]}
        with torch.cuda.device_of(x):
            kernels.multiply[grid](
                x.view(torch.int64), *prepared, shares, len(x), *shape, **options, **COMPILER
            )
            if block.split > 1:
                kernels.add_shares[(-(-out.numel() // ADDED),)](
                    shares, out, out.numel(), SPLIT=block.split, BLOCK=ADDED, **COMPILER
                )


@cache
def _units(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def compute_units(x: Tensor) -> int:
    """Multiprocessors, or AMD's compute units, of the device that holds a tensor."""
    return _units(x.device.index or 0)


def refusal(where: torch.device) -> str | None:
    """Why a device cannot run the kernels, for people; None when it can."""
    if where.type != "cuda":
        return f"it runs on CUDA devices, not on {where.type}"
    if reason := package_refusal():
        return reason
    arch = torch.cuda.get_device_capability(where)
    if torch.version.hip is None and arch < OLDEST:
        return f"compute capability {arch[0]}.{arch[1]} is older than 8.0"
    return None


def package_refusal() -> str | None:
    """Why the installed Triton cannot be used; None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "there is no Triton: pip install triton"
    import triton

    version = str(triton.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"
    return None
