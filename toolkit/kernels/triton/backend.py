"""triton: any packed weight, on GPUs that Triton compiles for.

The kernels read the parts of a format as they are: nothing is rounded, and besides views of parts
there are only 16 bits for each 32 columns that are not 2:4, and 8 bytes a row. Blocks have fixed
shapes for a weight and so many tokens; nothing is searched for. A block's columns lie in one group
of scales. Small weights are shared by columns, too, so that every compute unit has work; the shares
are added up in a fixed order.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from gblm.kernels.cuda.device import OLDEST
from gblm.kernels.few_tokens import FewTokens
from gblm.sparse.formats import Format, Parts, Shape
from gblm.sparse.formats.bits import byte_offsets, unpack_bits

OLDEST_TRITON = (3, 6)
WORD = 32
# Starts of words are 16 bits.
MAX_COLUMNS = 1 << 16
MAX_TOKENS = 16
# Rows and columns of a block, of 2:4 and of other masks: by the most tokens of a program, of which
# 64 are for experts alone; and of the dense weight.
SIZES = {1: ((16, 256), (8, 256)), MAX_TOKENS: ((32, 128), (32, 64)), 64: ((32, 64), (32, 64))}
DENSE = ((16, 256), (8, 256))
# Of Triton's compiler. Multiplications and additions are fused, whatever its version's default.
WARPS = 4
COMPILER = {"num_warps": WARPS, "enable_fp_fusion": True}
# Blocks that a compute unit should have, and columns that a share has at least.
BLOCKS_PER_UNIT, LEAST_SHARE, MOST_SHARES = 2, 512, 8
ADDED = 1024


class Triton(FewTokens):
    """Holds the parts as they are; takes bfloat16 or float16 activations."""

    name = "triton"
    formats = ("nm", "bitmask", "dense")
    max_tokens = MAX_TOKENS
    max_columns = MAX_COLUMNS

    def __init__(self, units_of: Callable[[Tensor], int] | None = None) -> None:
        """Take `units_of`, which counts the compute units of a tensor's device."""
        self._units_of = units_of or compute_units

    def refuses_device(self, device: torch.device) -> str | None:
        """Refuse other devices than CUDA's, old ones, and a missing Triton."""
        return refusal(device)

    def prepare(
        self, fmt: Format, parts: Parts, shape: Shape, dtype: torch.dtype = torch.bfloat16
    ) -> list[Tensor]:
        """Make the tensors of `Arrays`."""
        return list(arrays(fmt, parts, shape))

    def expand(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        """Write the dense weight on the device."""
        from gblm.kernels.triton import kernels

        stored, dense = Stored.of(fmt, shape), x.new_empty(shape)
        rows, columns = sized(DENSE, stored)
        grid = (-(-shape[0] // rows), -(-shape[1] // columns))
        options = stored.options(shape, rows, columns) | {"FLOAT": kernels.FLOATS[x.dtype]}
        with torch.cuda.device_of(x):
            kernels.expand[grid](*prepared, dense, *shape, **options, **COMPILER)
        return dense

    def multiply(
        self, x: Tensor, out: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape,
        pairs: Pairs | None = None,
    ) -> None:  # fmt: skip
        """Multiply; a second kernel adds up what shares of the columns give.

        With pairs the weight is a stack of experts' weights of this shape, x holds a line for each
        token or each pair, and out one for each pair; lines of pairs without expert stay as they
        are.
        """
        from gblm.kernels.triton import kernels

        stored = Stored.of(fmt, shape)
        tokens, groups = (pairs.most, len(pairs.groups)) if pairs else (len(x), 1)
        block = blocks(stored, shape, tokens, self._units_of(x), groups)
        shares = out
        if block.split > 1:
            shares = out.new_empty((block.split, *out.shape), dtype=torch.float32)
        grid = (-(-shape[0] // block.rows), block.split, groups)
        options = stored.options(shape, block.rows, block.columns)
        options |= {"TOKENS": block.tokens, "SPLIT": block.split, "FLOAT": kernels.FLOATS[x.dtype]}
        options |= {"CHOSEN": len(out) // len(x) if pairs else 0}
        sorted_pairs = (pairs.order, pairs.groups) if pairs else (None, None)
        with torch.cuda.device_of(x):
            kernels.multiply[grid](
                x.view(torch.int64), *prepared, shares, *sorted_pairs, len(out), *shape,
                **options, **COMPILER,
            )  # fmt: skip
            if block.split > 1:
                kernels.add_shares[(-(-out.numel() // ADDED),)](
                    shares, out, out.numel(), SPLIT=block.split, BLOCK=ADDED, **COMPILER
                )


@cache
def _units(index: int) -> int:
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


def compute_units(x: Tensor) -> int:
    """Count the multiprocessors, or AMD's compute units, of the device of a tensor."""
    return _units(x.device.index or 0)


def refusal(where: torch.device) -> str | None:
    """Say why a device cannot run the kernels, for people; None when it can."""
    if where.type != "cuda":
        return f"it runs on CUDA devices, not on {where.type}"
    if reason := package_refusal():
        return reason
    arch = torch.cuda.get_device_capability(where)
    if torch.version.hip is None and arch < OLDEST:
        return f"compute capability {arch[0]}.{arch[1]} is older than 8.0"
    return None


def package_refusal() -> str | None:
    """Say why the installed Triton cannot be used; None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "there is no Triton: pip install triton"
    import triton

    version = str(triton.__version__)
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is older than {OLDEST_TRITON[0]}.{OLDEST_TRITON[1]}"
    return None


class Arrays(NamedTuple):
    """The arrays are one weight [out, in] as the kernels read it.

    Attributes:
        values: the part, of 2:4 weights a word for each four columns: int32 of floats, int16 of
            codes of 8 bits, uint8 of 4-bit codes.
        words: int32 [out, in/32], the bitmask; bit i of word w is column 32·w + i. Rows that are no
            whole words end in zeros.
        starts: int16 [out, in/32], read as unsigned: kept values of the row before the word.
            Empty for 2:4, like `begins`.
        begins: int64 [out], where the row begins in `values`, in its elements.
        scales: bfloat16 [out, groups], empty for floats.
    """

    values: Tensor
    words: Tensor
    starts: Tensor
    begins: Tensor
    scales: Tensor


class Pairs(NamedTuple):
    """The pairs of a token and an expert it has chosen, in groups of one expert.

    Attributes:
        order: int64 [pairs], the pairs sorted by expert; pair t·chosen + i is token t's i-th.
        groups: int64 [groups, 3]: its expert, where in `order` it begins, and its pairs, of which
            there may be none.
        most: the pairs that a group may have.
    """

    order: Tensor
    groups: Tensor
    most: int

    @classmethod
    def of(cls, ids: Tensor, experts: int) -> Pairs:
        """Sort pairs, without waiting for the device; other ids than those of experts are left out.

        Args:
            ids: the experts that each token has chosen, [tokens, chosen].
            experts: how many there are.
        """
        tokens, num_pairs = len(ids), ids.numel()
        # One token meets an expert once; of more, as many share its weight as do on average.
        shared = 1 if tokens == 1 else max(2, -(-num_pairs // experts))
        most = next((size for size in SIZES if size >= shared), max(SIZES))
        owners, order = ids.flatten().long().sort(stable=True)
        numbers = torch.arange(experts, device=ids.device)
        begins = torch.searchsorted(owners, numbers)
        ends = torch.searchsorted(owners, numbers, right=True)
        sizes = (ends - begins + most - 1) // most
        last = sizes.cumsum(0)
        # As many groups as there can be, since only the device knows how many there are.
        group = torch.arange(min(num_pairs, experts + num_pairs // most), device=ids.device)
        expert = torch.searchsorted(last, group, right=True).clamp(max=experts - 1)
        first = begins[expert] + (group - last[expert] + sizes[expert]) * most
        count = (ends[expert] - first).clamp(0, most)
        return cls(order, torch.stack([expert, first, count], 1), most)


def is_two_four(fmt: Format) -> bool:
    """Tell whether four columns keep two values, at a place that follows from the columns."""
    return str(fmt.pattern) == "2:4"


def arrays(fmt: Format, parts: Parts, shape: Shape) -> Arrays:
    """Turn the parts of a weight into what the kernels read.

    Args:
        fmt: the format nm or bitmask, with any value type.
        parts: the stored tensors; floating values in the activations' dtype.
        shape: the weight's [out, in], `in` at most MAX_COLUMNS.
    """
    values, words = parts["values"].contiguous(), _words(parts["bitmask"])
    starts, begins = values.new_empty(0, dtype=torch.int16), values.new_empty(0, dtype=torch.int64)
    if is_two_four(fmt):
        wide = {1: torch.int16, 2: torch.int32}
        values = values if fmt.values.in_nibbles else values.view(wide[values.element_size()])
    else:
        counts = unpack_bits(words.view(torch.uint8)).reshape(shape[0], -1, WORD).sum(dim=-1)
        starts = (counts.cumsum(dim=-1) - counts).to(torch.int16)
        begins = _begins(fmt, counts.sum(dim=-1))
    scales = parts.get("scales", values.new_empty(0, dtype=torch.bfloat16))
    return Arrays(values, words, starts, begins, scales.contiguous())


def _words(bitmask: Tensor) -> Tensor:
    """View a bitmask [out, in/8] uint8 as int32 words; copy it where rows are no whole words."""
    bytes_missing = -bitmask.shape[1] % (WORD // 8)
    whole: Tensor = functional.pad(bitmask, (0, bytes_missing)) if bytes_missing else bitmask
    return whole.contiguous().view(torch.int32)


def _begins(fmt: Format, counts: Tensor) -> Tensor:
    """Say where rows of so many codes begin; rows of 4-bit codes begin at a byte."""
    if fmt.values.in_nibbles:
        return byte_offsets(counts)[:-1].contiguous()
    return counts.cumsum(0) - counts


@dataclass(frozen=True)
class Stored:
    """The facts of a weight that the kernels are compiled for.

    `kind` is the bits of a value, 16, 8 or 4; `group` is the number of columns that share a scale,
    0 for floats and for one scale a row.
    """

    two_four: bool
    kind: int
    group: int

    def options(self, shape: Shape, rows: int, columns: int) -> dict[str, int]:
        """Give the kernels' compile-time arguments, for a weight [out, in] and such blocks."""
        return {
            "TWO_FOUR": self.two_four, "KIND": self.kind, "GROUP": self.group,
            "TAIL": shape[1] % columns != 0, "ROWS": rows, "COLUMNS": columns,
        }  # fmt: skip

    @classmethod
    def of(cls, fmt: Format, shape: Shape) -> Stored:
        """Take the facts from the format of a weight [out, in]."""
        group = 0 if fmt.values.is_float else fmt.values.group(shape[1])
        return cls(is_two_four(fmt), fmt.values.bits, 0 if group == shape[1] else group)


@dataclass(frozen=True)
class Blocks:
    """The blocks of a launch of `multiply`: the rows of one, and the columns it takes at a time.

    `tokens` is one of SIZES; `split` is the number of shares of the columns.
    """

    rows: int
    columns: int
    tokens: int
    split: int


def blocks(stored: Stored, shape: Shape, tokens: int, units: int, groups: int = 1) -> Blocks:
    """Choose the blocks that multiply a weight, or those of experts.

    Args:
        stored: the facts of the weight.
        shape: its [out, in].
        tokens: the number of tokens, 1 to the most of SIZES.
        units: the number of the device's compute units.
        groups: how many groups of so many tokens there may be.
    """
    most = next(size for size in SIZES if size >= tokens)
    rows, columns = sized(SIZES[most], stored)
    along, split = -(-shape[0] // rows) * groups, 1
    while (
        split < MOST_SHARES
        and along * split < BLOCKS_PER_UNIT * units
        and shape[1] >= 2 * split * LEAST_SHARE
    ):
        split *= 2
    return Blocks(rows, columns, most, split)


def sized(block: tuple[tuple[int, int], tuple[int, int]], stored: Stored) -> tuple[int, int]:
    """Give rows and columns of a block of `block`'s size, whose columns divide a scale's group."""
    rows, whole = block[0] if stored.two_four else block[1]
    columns = whole
    if stored.group:
        columns = min(whole, stored.group & -stored.group)
    return rows * whole // columns, columns
