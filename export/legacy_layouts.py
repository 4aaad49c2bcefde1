"""Read a weight as compressed-tensors stored it: LAYOUTS has an entry for each of its formats.

Part names, shapes and bit order of the bitmasks are those of compressed-tensors 0.9.4, which wrote
them last. marlin-24 is a kernel's layout, which the library could only write: every reordering is a
permutation of the bits of row and column numbers, so each is undone by one reshape and one permute.
Knows no folders.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gblm.errors import CheckpointError, InputError
from gblm.model.reader import Header
from gblm.sparse.formats import VALUE_DTYPES, Headers, TensorSpec
from gblm.sparse.formats.bits import expand_bits, unpack_bits
from gblm.sparse.values import FLOAT, GROUP_SIZES, ROW, SCALE_DTYPE, ValueType
from gblm.sparse.weights import SparseWeight

TWO_OF_FOUR, ANY_MASK, MARLIN, PLAIN = "sparse-24-bitmask", "sparse-bitmask", "marlin-24", "dense"
INT8, FP8 = torch.int8, torch.float8_e4m3fn
SCALE = "weight_scale"
# The codes of 16 inputs and 64 outputs in the order of their words: what their numbers are made of;
# and, per code size, the order of the same digits in an input-major matrix.
TILE = (4, 2, 4, 4, 2, 2, 2)
ORDER = {4: (0, 8, 4, 6, 1, 2, 3, 7, 5), 8: (0, 8, 4, 7, 1, 2, 3, 6, 5)}
# What the products of fp8 codes and scales are rounded to, once.
ROUNDED = torch.bfloat16
ROUNDING = (
    "fp8 codes × scales are rounded once to bfloat16 (relative error at most 2^-8, that of fp8 "
    "itself is 2^-4)"
)
Parts = Mapping[str, Tensor]


@dataclass(frozen=True)
class Scales:
    """Says how the scales of a weight's codes lie: `groups` a row, each for so many `columns`.

    `grouped` tells whether config.json names groups of this size, and not whole rows.
    """

    dtype: torch.dtype
    groups: int
    columns: int
    grouped: bool = False


@dataclass(frozen=True)
class Raw:
    """Holds what a weight is stored as: values or codes [rows, columns], the mask, and scales."""

    values: Tensor
    mask: Tensor
    scales: Tensor | None


@dataclass(frozen=True)
class Stored:
    """Describes a stored weight by the headers of its parts.

    `name` is that of the dense tensor, and `prefix` what the names of its parts begin with, which
    before 0.9 kept the ".weight". `layout` is a name of LAYOUTS. `shape` has one or two dimensions.
    `dtype` is that of values or codes, and an integer code has so many `bits`.
    """

    name: str
    prefix: str
    layout: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int = 8
    scales: Scales | None = None

    @property
    def parts(self) -> dict[str, str]:
        """Name the parts that it is stored in, by their local names."""
        parts = {part: f"{self.prefix}.{part}" for part in LAYOUTS[self.layout].parts}
        if self.scales is not None and self.layout != MARLIN:
            parts[SCALE] = self.scale_name
        return parts

    @property
    def scale_name(self) -> str:
        """Name the tensor that holds its scales, but in marlin-24."""
        return f"{self.name.removesuffix('weight')}{SCALE}"

    def scaled(self, header: Header, allowed: frozenset[str | int]) -> Stored:
        """Hold the header of the scales against the weight's.

        Args:
            header: of the scales.
            allowed: how scales may lie, see `gblm.export.legacy.Settings`.

        Raises:
            CheckpointError: they do not belong together, or not to config_groups.
        """
        found, dtype = header
        if len(self.shape) == 2 and self.dtype in (INT8, FP8) and dtype in VALUE_DTYPES:
            rows, columns = self.shape
            if found in ((), (1,)) and "tensor" in allowed:
                return replace(self, scales=Scales(dtype, 1, columns))
            if len(found) == 2 and found[0] == rows and found[1] > 0 and columns % found[1] == 0:
                size = columns // found[1]
                if size in allowed or (size == columns and "channel" in allowed):
                    return replace(self, scales=Scales(dtype, found[1], size, size in allowed))
        raise CheckpointError(
            f"{self.name}: scales of {list(found)} {dtype} and codes of {list(self.shape)} "
            f"{self.dtype} are not what config_groups says."
        )

    @property
    def values(self) -> ValueType:
        """Choose how we store it: integer codes as they are, fp8 as the floats it stands for.

        Raises:
            InputError: we have no groups of this size.
        """
        if self.scales is None or self.dtype == FP8:
            return FLOAT
        kind, size = "int4" if self.bits == 4 else "int8", self.scales.columns
        if self.scales.grouped and size in GROUP_SIZES:
            return ValueType(kind, size)
        if self.scales.groups > 1:
            raise InputError(
                f"{self.name}: groups of {size} columns cannot be stored; "
                f"{', '.join(map(str, GROUP_SIZES))} can."
            )
        return ValueType(kind, ROW)

    @property
    def floating(self) -> torch.dtype:
        """Give the dtype of its floats, or of those that its codes stand for."""
        if self.dtype == FP8:
            return ROUNDED
        return self.dtype if self.scales is None else self.scales.dtype

    def raw(self, parts: Parts) -> Raw:
        """Put values or codes at their places.

        Args:
            parts: by the names in `parts`.

        Raises:
            CheckpointError: the parts do not agree, or a scale is not finite and positive.
        """
        raw = LAYOUTS[self.layout].expand(self, parts)
        if self.scales is None or raw.scales is None:
            return raw
        scales = raw.scales.reshape(-1, self.scales.groups).expand(len(raw.values), -1)
        if not bool((scales.isfinite() & (scales > 0)).all()):
            raise CheckpointError(f"{self.name}: a scale is not positive. The file is damaged.")
        return replace(raw, scales=scales)

    def floats(self, raw: Raw) -> Tensor:
        """Give [rows, columns] of floats; codes times scales as the old library multiplied them."""
        if self.scales is None or raw.scales is None:
            return raw.values
        scales = raw.scales.float().repeat_interleave(self.scales.columns, 1)
        return scales.mul_(raw.values.float()).to(self.floating)

    def weight(self, raw: Raw) -> SparseWeight:
        """Make the weight in our value type: integer codes without loss, fp8 as `floats`.

        Raises:
            InputError: our value type cannot hold the scales.
        """
        if raw.scales is None or self.dtype == FP8:
            return SparseWeight(self.floats(raw), raw.mask)
        scales = raw.scales.to(SCALE_DTYPE).contiguous()
        if not torch.equal(scales.double(), raw.scales.double()):
            raise InputError(
                f"{self.name}: its scales do not fit bfloat16, so the weights would change; start "
                "from the dense model."
            )
        return SparseWeight.from_codes(raw.values, scales, raw.mask, self.floating)

    def damaged(self, part: str, what: str) -> CheckpointError:
        """Say what is wrong with a part."""
        return CheckpointError(f"{self.prefix}.{part}: {what}. The file is damaged.")


def _describe_bitmask(layout: str, prefix: str, headers: Headers, shape: list[int]) -> Stored:
    pairs = layout == TWO_OF_FOUR
    if not 1 + pairs <= len(shape) <= 2 or min(shape) < 1 or (pairs and shape[1] % 4):
        raise CheckpointError(f"{prefix}.shape: {shape} is no shape of {layout}.")
    *rows, columns = shape
    dtype = headers["compressed"][1]
    wanted = {
        "bitmask": TensorSpec((*rows, (columns + 7) // 8), torch.uint8),
        "compressed": TensorSpec((*rows, columns // 2) if pairs else (-1,), dtype),
        "row_offsets": TensorSpec(tuple(rows), torch.int64),
    }
    for part in LAYOUTS[layout].parts[1:]:
        if not wanted[part].fits(*headers[part]):
            raise CheckpointError(
                f"{prefix}.{part}: is {list(headers[part][0])} {headers[part][1]}, but a tensor of "
                f"{shape} in {layout} needs {list(wanted[part].shape)} {wanted[part].dtype}."
            )
    weightless = prefix.rpartition(".")[2] not in ("weight", "bias")
    return Stored(f"{prefix}.weight" if weightless else prefix, prefix, layout, tuple(shape), dtype)


def _expand_bitmask(stored: Stored, parts: Parts) -> Raw:
    columns, bits = stored.shape[-1], parts["bitmask"]
    bits = bits.reshape(-1, bits.shape[-1])
    mask, values = unpack_bits(bits), parts["compressed"].reshape(-1)
    if mask[:, columns:].any():
        raise stored.damaged("bitmask", f"has bits behind column {columns - 1}")
    mask = mask[:, :columns]
    counts = mask.sum(dim=1, dtype=torch.int64)
    if stored.layout == TWO_OF_FOUR:
        _check_pairs(stored, "bitmask", mask.reshape(len(mask), -1, 4).sum(dim=-1) == 2)
    else:
        wrong = (parts["row_offsets"].reshape(-1) != counts.cumsum(0) - counts).nonzero()
        if len(wrong):
            what = f"do not count the bits before row {int(wrong[0])}"
            raise stored.damaged("row_offsets", what)
        if (kept := int(counts.sum())) != len(values):
            raise stored.damaged("compressed", f"has {len(values)} values for {kept} bits")
    if stored.dtype.itemsize == 1:  # torch does not scatter fp8 on CPU
        values = values.view(torch.uint8)
    dense = expand_bits(values, bits)[:, :columns].view(stored.dtype)
    return Raw(dense, mask, parts.get(SCALE))


def _check_pairs(stored: Stored, part: str, right: Tensor) -> None:
    """Refuse a weight of which a group of four does not keep two; `right` is [rows, groups]."""
    wrong = (~right).nonzero()
    if len(wrong):
        row, group = (int(i) for i in wrong[0])
        raise stored.damaged(part, f"does not keep two of row {row}, columns {4 * group}..")


def _describe_marlin(layout: str, prefix: str, headers: Headers, shape: list[int]) -> Stored:
    names = LAYOUTS[layout].parts
    (words, word), (scales, scale), (meta, bit) = (headers[part] for part in names)
    kinds = (word, scale, bit) == (torch.int32, torch.float16, torch.int16)
    if kinds and len(words) == len(scales) == len(meta) == 2:
        (blocks, width), (groups, rows) = words, scales
        bits = 2 * width // rows if rows else 0
        fits = width == rows * bits // 2 and meta == (blocks, 2 * rows)
        whole = rows % 64 == 0 and blocks > 0 and groups > 0 and 32 * blocks % groups == 0
        if bits in ORDER and fits and whole:
            return Stored(f"{prefix}.weight", prefix, layout, (rows, 32 * blocks), INT8, bits)
    found = ", ".join(f"{part} {list(headers[part][0])} {headers[part][1]}" for part in names)
    raise CheckpointError(f"{prefix}: {found} are no parts of one weight in {layout}.")


def _expand_marlin(stored: Stored, parts: Parts) -> Raw:
    rows, columns = stored.shape
    places = _marlin_places(stored, parts["meta"]).reshape(rows, -1, 2)
    codes = _marlin_codes(stored, parts["weight_packed"]).reshape(rows, -1, 2)
    dense = torch.zeros(rows, columns // 4, 4, dtype=INT8)
    mask = torch.zeros(dense.shape, dtype=torch.bool)
    dense.scatter_(2, places, codes)
    mask.scatter_(2, places, True)
    scales, groups = parts["scale_packed"], len(parts["scale_packed"])
    # The library reorders the scales of groups that are shorter than a row of kept weights.
    if groups > 2:
        scales = scales.reshape(groups, rows // 8, 4, 2).transpose(2, 3)
    return Raw(dense.reshape(rows, -1), mask.reshape(rows, -1), scales.reshape(groups, rows).t())


def _marlin_codes(stored: Stored, words: Tensor) -> Tensor:
    """Read the kept codes of every row in column order, [out, in/2] int8."""
    rows, columns = stored.shape
    shifts = torch.arange(0, 32, stored.bits, dtype=torch.int32)
    codes = (words.unsqueeze(-1) >> shifts) & (2**stored.bits - 1)
    tiles = codes.reshape(columns // 32, rows // 64, *TILE)
    codes = tiles.permute(ORDER[stored.bits]).reshape(columns // 2, rows).t()
    return torch.sub(codes, 2 ** (stored.bits - 1)).to(INT8)


def _marlin_places(stored: Stored, meta: Tensor) -> Tensor:
    """Read which two of every four are kept, ascending, [out, in/4, 2] int64."""
    rows, columns = stored.shape
    bits = meta.reshape(columns // 32, rows // 64, 2, 8, 2, 2, 2)
    words = bits.permute(1, 3, 6, 2, 4, 0, 5).reshape(rows, columns // 16, 1).to(torch.int64)
    pairs = (words >> torch.tensor([0, 4, 8, 12])) & 15
    places = torch.stack([pairs & 3, pairs >> 2], dim=-1).reshape(rows, columns // 4, 2)
    _check_pairs(stored, "meta", places[..., 0] < places[..., 1])
    return places


def _describe_plain(layout: str, prefix: str, headers: Headers, shape: list[int]) -> Stored:
    return Stored(f"{prefix}.weight", prefix, layout, *headers["weight"])


def _expand_plain(stored: Stored, parts: Parts) -> Raw:
    """Take the floats or codes of a pruned weight as they are: zero is where nothing is kept."""
    values = parts["weight"]
    comparable = values.float() if stored.dtype == FP8 else values
    return Raw(values, comparable != 0, parts.get(SCALE))


@dataclass(frozen=True)
class Layout:
    """Names the parts of a weight, and says how it is described by headers and read.

    `describe` takes the layout's name, what the parts' names begin with, their headers and the
    content of the part `shape`. It raises CheckpointError when they do not belong to one weight.
    """

    parts: tuple[str, ...]
    describe: Callable[[str, str, Headers, list[int]], Stored]
    expand: Callable[[Stored, Parts], Raw]


LAYOUTS = {
    TWO_OF_FOUR: Layout(("shape", "compressed", "bitmask"), _describe_bitmask, _expand_bitmask),
    ANY_MASK: Layout(
        ("shape", "compressed", "bitmask", "row_offsets"), _describe_bitmask, _expand_bitmask
    ),
    MARLIN: Layout(("weight_packed", "scale_packed", "meta"), _describe_marlin, _expand_marlin),
    PLAIN: Layout(("weight",), _describe_plain, _expand_plain),
}
