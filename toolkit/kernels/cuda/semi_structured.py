"""semi_structured: 2:4 weights in the tiles of `mma_sp`, and for many tokens whatever is fastest.

Above 64 tokens a measurement per shape and number of tokens decides: the tiles, 64 tokens at a
time; the weight expanded, then a dense product; or, if memory is declared plentiful, a second
layout, the fastest of cuSPARSELt, CUTLASS and dense that is at no size slower than dense.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from gblm.errors import UsageError
from gblm.formats import Format, Parts, Shape
from gblm.kernels.autotune import Autotuner, Key, never_slower
from gblm.kernels.base import Backend
from gblm.kernels.cuda.device import Device, device_of
from gblm.kernels.cuda.libraries import LIBRARIES, Library
from gblm.kernels.cuda.sparse_tensor_core import MAX_TOKENS, SparseTensorCore
from gblm.kernels.cuda.tuning import tuner_of
from gblm.kernels.few_tokens import aligned

MEMORY_VARIABLE = "GBLM_GPU_MEMORY"
MEMORY = ("scarce", "plentiful")
NUM_TILES = 3
# Sizes of prefill at which second layouts are compared, once a shape.
LADDER = (128, 512, 2048)
# Tokens beyond which one more pass over the tiles cannot win; and the largest measured size.
MAX_SLICED, MAX_MEASURED = 512, 8192
DENSE, TILES, EXPAND = "dense", "tiles", "expand"
Call = Callable[[], object]


def plentiful_memory() -> bool:
    """What GBLM_GPU_MEMORY says; scarce if nothing.

    Raises:
        UsageError: it says neither "scarce" nor "plentiful".
    """
    word = os.environ.get(MEMORY_VARIABLE) or MEMORY[0]
    if word not in MEMORY:
        raise UsageError(f"{MEMORY_VARIABLE} is {word[:40]!r}: use {' or '.join(MEMORY)}.")
    return word == "plentiful"


class SemiStructured(Backend):
    """Tiles in memory, a second layout on demand; refuses what `mma_sp` refuses."""

    name = "semi_structured"
    packed = True
    needs = "cuda"

    def __init__(
        self,
        device_of: Callable[[Tensor], Device] = device_of,
        tuner_of: Callable[[Tensor], Autotuner] = tuner_of,
        libraries: Sequence[Library] = LIBRARIES,
        plentiful: bool | None = None,
    ) -> None:
        """Choose what it works with.

        Args:
            device_of: finds where activations lie; tests give it an emulated device.
            tuner_of: finds who chooses there.
            libraries: whose layouts may be the second one.
            plentiful: whether a weight may have a second layout; GBLM_GPU_MEMORY says so if None.
        """
        self._tiles = SparseTensorCore(device_of)
        self._tuner_of, self._plentiful = tuner_of, plentiful
        self._libraries: Mapping[str, Library] = {one.name: one for one in libraries}

    def refuses(
        self, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
    ) -> str | None:
        """As `mma_sp`."""
        return self._tiles.refuses(fmt, shape, dtype, device)

    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """Tiles, see `pack_tiles`; then the tensors of the second layout, if there is one."""
        tiles = self._tiles.prepare(fmt, parts, shape, dtype)
        plentiful = plentiful_memory() if self._plentiful is None else self._plentiful
        if not plentiful:
            return tiles
        dense = fmt.expand(parts, dtype).contiguous()
        chosen = self._second(dense)
        return [*tiles, *([dense] if chosen == DENSE else self._libraries[chosen].pack(dense))]

    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """Waits for the device only where a size is new, and never while a graph is captured."""
        tokens = aligned(x.reshape(-1, shape[1]))
        if len(tokens) <= MAX_TOKENS:
            return self._tiles.linear(x, prepared[:NUM_TILES], fmt, shape)
        second, size = self._held(prepared, shape), measured_size(len(tokens))
        fallback = EXPAND if second is None else second
        names = [fallback] if size > MAX_SLICED else [TILES, fallback]
        if second not in (None, DENSE):
            names.append(EXPAND)
        tuner, key = self._tuner_of(x), (*_about(shape, x.dtype), size, fmt.spec, *names)

        def make(name: str) -> Call:
            sample = repeated(tokens, size)
            return lambda: self._multiply(name, sample, prepared, fmt, shape)

        route = names[0] if len(names) == 1 else tuner.choose(key, names, make, fallback)
        out = self._multiply(route, tokens, prepared, fmt, shape)
        return out.reshape(*x.shape[:-1], shape[0])

    def _multiply(
        self, route: str, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape
    ) -> Tensor:
        """x [tokens, in] on one of the ways."""
        if route == TILES:
            out = x.new_empty((len(x), shape[0]))
            for start in range(0, len(x), MAX_TOKENS):
                piece = slice(start, start + MAX_TOKENS)
                self._tiles.multiply(x[piece], out[piece], prepared[:NUM_TILES], fmt, shape)
            return out
        if route == EXPAND:
            return functional.linear(x, self._tiles.expand(x, prepared[:NUM_TILES], fmt, shape))
        return self._by_second(route, prepared[NUM_TILES:], x, shape)

    def _by_second(self, name: str, second: Sequence[Tensor], x: Tensor, shape: Shape) -> Tensor:
        """x [tokens, in] @ W.T with the second layout of this name."""
        if name == DENSE:
            return functional.linear(x, second[0])
        library, size = self._libraries[name], measured_size(len(x))
        algorithm = self._tuner_of(x).settle(
            (*_about(shape, x.dtype), size, "algorithm", name),
            lambda: str(library.search(second, library.padded(repeated(x, size)))),
            lambda answer: answer.isdecimal() and len(answer) <= 3,
            default="0",
        )
        return library.multiply(second, x, int(algorithm))

    def _second(self, dense: Tensor) -> str:
        """Which layout the dense weight [out, in] gets besides the tiles."""
        shape, tuner = (dense.shape[0], dense.shape[1]), self._tuner_of(dense)
        key = (*_about(shape, dense.dtype), "second")
        possible = {
            name: library
            for name, library in self._libraries.items()
            if library.refuses(shape, dense.dtype) is None
        }
        find = partial(self._fastest_second, key, dense, possible)
        return tuner.settle(key, find, lambda answer: answer in (DENSE, *possible), DENSE)

    def _fastest_second(
        self, key: Key, dense: Tensor, possible: Mapping[str, Library]
    ) -> str | None:
        shape, tuner = (dense.shape[0], dense.shape[1]), self._tuner_of(dense)
        seconds: dict[str, list[float]] = {}
        for name in (DENSE, *possible):
            second = [dense] if name == DENSE else possible[name].pack(dense)

            def make(size: str, name: str = name, second: Sequence[Tensor] = second) -> Call:
                x = torch.randn(int(size), shape[1], device=dense.device, dtype=dense.dtype)
                return lambda: self._by_second(name, second, x, shape)

            found = tuner.measure((*key, name), [str(size) for size in LADDER], make)
            if len(found) == len(LADDER):
                seconds[name] = list(found.values())
        return never_slower(seconds, DENSE) if DENSE in seconds else None

    def _held(self, prepared: Sequence[Tensor], shape: Shape) -> str | None:
        """The name of the second layout; it is told by its tensors, as `prepare` made them."""
        second = prepared[NUM_TILES:]
        if not second:
            return None
        if tuple(second[0].shape) == tuple(shape):
            return DENSE
        return next(n for n, one in self._libraries.items() if one.num_tensors == len(second))


def measured_size(tokens: int) -> int:
    """Sizes share a measurement up to the next power of two, and beyond 8192."""
    return min(1 << (tokens - 1).bit_length(), MAX_MEASURED)


def repeated(x: Tensor, size: int) -> Tensor:
    """The tokens of x [tokens, in] again and again, or the first of them: [size, in]."""
    return x[torch.arange(size, device=x.device) % len(x)]


def _about(shape: Shape, dtype: torch.dtype) -> Key:
    return (*shape, str(dtype).removeprefix("torch."))
