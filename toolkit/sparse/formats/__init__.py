"""FORMATS: every on-disk layout by name; the list is closed, a checkpoint cannot add to it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from gblm.errors import CheckpointError, PatternError
from gblm.sparse.formats.base import VALUE_DTYPES, Format, Headers, Parts, Shape, TensorSpec
from gblm.sparse.formats.bitmask import BitmaskFormat
from gblm.sparse.formats.dense import DenseFormat
from gblm.sparse.formats.nm import NMFormat
from gblm.sparse.patterns import Pattern, Unstructured, parse
from gblm.sparse.values import AUTO, FLOAT, ValueType, parse_values

__all__ = [
    "FORMATS",
    "VALUE_DTYPES",
    "Format",
    "Headers",
    "Parts",
    "Shape",
    "TensorSpec",
    "format_for",
    "from_spec",
    "join_formats",
    "make_format",
]

FORMATS: dict[str, type[Format]] = {
    "nm": NMFormat,
    "bitmask": BitmaskFormat,
    "dense": DenseFormat,
}


def format_for(pattern: Pattern, values: ValueType = FLOAT) -> Format:
    """Make the first format of the table that holds a pattern's weights.

    Raises:
        PatternError: there is none.
    """
    found = next((fmt for fmt in FORMATS.values() if fmt.holds(pattern)), None)
    if found is None:
        raise PatternError(f"no format stores weights of pattern {pattern}.")
    return found(pattern, values)


def join_formats(formats: Iterable[Format]) -> Format | None:
    """Find the format of weights that are joined row after row; None if there is none.

    Masks of the format bitmask join whatever their patterns, for it holds any.
    """
    every = list(formats)
    if len({fmt.spec for fmt in every}) == 1:
        return every[0]
    if {fmt.name for fmt in every} != {"bitmask"} or len({fmt.values for fmt in every}) > 1:
        return None
    sparsity = min(fmt.pattern.sparsity for fmt in every)
    return BitmaskFormat(Unstructured(sparsity), every[0].values)


def make_format(name: str, pattern: str, values: str = "float") -> Format:
    """Build a format from the names in a manifest.

    Raises:
        CheckpointError: a name is unknown, or they do not go together.
    """
    if name not in FORMATS:
        raise CheckpointError(
            f"format {name!r} is unknown: this version reads {', '.join(FORMATS)}."
        )
    try:
        parsed, kind = parse(pattern), parse_values(values)
    except PatternError as error:
        raise CheckpointError(f"manifest: {error}") from error
    if not FORMATS[name].holds(parsed):
        raise CheckpointError(f"format {name!r} cannot hold weights of pattern {pattern!r}.")
    if not kind.is_float and kind.group_size == AUTO:
        raise CheckpointError(f"manifest: values {values!r} leave the group size open.")
    try:
        return FORMATS[name](parsed, kind)
    except PatternError as error:
        raise CheckpointError(f"manifest: {error}") from error


@lru_cache(maxsize=64)
def from_spec(spec: str) -> Format:
    """Make the format that a Format.spec identifies."""
    name, pattern, *values = spec.split("/")
    return make_format(name, pattern, *values)
