"""Shapes of the kernels' blocks: fixed for a weight and so many tokens, never searched for.

A block's columns lie in one group of scales. Small weights are shared by columns, too, so that
every compute unit has work; the shares are added up in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass

from gblm.formats import Format, Shape
from gblm.kernels.triton.layout import is_two_four

MAX_TOKENS = 16
KINDS = {"float": 16, "int8": 8, "int4": 4, "uint4": 14, "fp8": 28}
# Rows and columns of a block for one token, for more, and of the dense weight: 2:4, other masks.
ONE, MANY, DENSE = ((16, 256), (8, 256)), ((32, 128), (32, 64)), ((16, 256), (8, 256))
# Of Triton's compiler. Multiplications and additions are fused, whatever its version's default.
WARPS = 4
COMPILER = {"num_warps": WARPS, "enable_fp_fusion": True}
# Blocks that a compute unit should have, and columns that a share has at least.
BLOCKS_PER_UNIT, LEAST_SHARE, MOST_SHARES = 2, 512, 8
ADDED = 1024


@dataclass(frozen=True)
class Stored:
    """What the kernels are compiled for, of a weight.

    Attributes:
        two_four: whether the pattern is 2:4.
        kind: of values, as in KINDS.
        group: columns that share a scale; 0 when there are none, or one for a whole row.
    """

    two_four: bool
    kind: int
    group: int

    def options(self, shape: Shape, rows: int, columns: int) -> dict[str, int]:
        """The kernels' compile-time arguments, for a weight [out, in] and such blocks."""
        return {
            "TWO_FOUR": self.two_four, "KIND": self.kind, "GROUP": self.group,
            "TAIL": shape[1] % columns != 0, "ROWS": rows, "COLUMNS": columns,
        }  # fmt: skip

    @classmethod
    def of(cls, fmt: Format, shape: Shape) -> Stored:
        """Of a weight [out, in]."""
        group = 0 if fmt.values.is_float else fmt.values.group(shape[1])
        return cls(is_two_four(fmt), KINDS[fmt.values.kind], 0 if group == shape[1] else group)


@dataclass(frozen=True)
class Blocks:
    """How `multiply` is launched.

    Attributes:
        rows: of a block.
        columns: of a block, at a time.
        tokens: of a block, 1 or MAX_TOKENS.
        split: shares of the columns.
    """

    rows: int
    columns: int
    tokens: int
    split: int


def blocks(stored: Stored, shape: Shape, tokens: int, units: int) -> Blocks:
    """The blocks that multiply a weight.

    Args:
        stored: of the weight.
        shape: [out, in] of it.
        tokens: 1 to MAX_TOKENS.
        units: compute units of the device.
    """
    rows, columns = sized(ONE if tokens == 1 else MANY, stored)
    along, split = -(-shape[0] // rows), 1
    while (
        split < MOST_SHARES
        and along * split < BLOCKS_PER_UNIT * units
        and shape[1] >= 2 * split * LEAST_SHARE
    ):
        split *= 2
    return Blocks(rows, columns, 1 if tokens == 1 else MAX_TOKENS, split)


def sized(block: tuple[tuple[int, int], tuple[int, int]], stored: Stored) -> tuple[int, int]:
    """Rows and columns of a block as large as `block`, whose columns divide the group of scales."""
    rows, whole = block[0] if stored.two_four else block[1]
    columns = whole
    if stored.group:
        columns = min(whole, stored.group & -stored.group)
    return rows * whole // columns, columns
