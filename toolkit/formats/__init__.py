"""FORMATS: every on-disk layout by name; the list is closed, a checkpoint cannot add to it."""

from __future__ import annotations

from functools import lru_cache

from gblm.errors import CheckpointError, PatternError
from gblm.formats.base import Format, Parts, Shape, TensorSpec
from gblm.formats.bitmask import BitmaskFormat
from gblm.formats.nm import NMFormat
from gblm.patterns import NM, Pattern, parse

__all__ = [
    "FORMATS",
    "Format",
    "Parts",
    "Shape",
    "TensorSpec",
    "format_for",
    "from_spec",
    "make_format",
]

FORMATS: dict[str, type[Format]] = {"nm": NMFormat, "bitmask": BitmaskFormat}


def format_for(pattern: Pattern) -> Format:
    """The format that stores a pattern's weights in the fewest bytes."""
    return NMFormat(pattern) if isinstance(pattern, NM) else BitmaskFormat(pattern)


def make_format(name: str, pattern: str) -> Format:
    """Build a format from the names in a manifest.

    Raises:
        CheckpointError: a name is unknown, or the two do not go together.
    """
    if name not in FORMATS:
        raise CheckpointError(
            f"format {name!r} is unknown: this version reads {', '.join(FORMATS)}."
        )
    try:
        parsed = parse(pattern)
    except PatternError as error:
        raise CheckpointError(f"manifest: {error}") from error
    if isinstance(parsed, NM) != (name == "nm"):
        raise CheckpointError(f"format {name!r} cannot hold weights of pattern {pattern!r}.")
    return FORMATS[name](parsed)


@lru_cache(maxsize=64)
def from_spec(spec: str) -> Format:
    """The inverse of Format.spec."""
    name, _, pattern = spec.partition("/")
    return make_format(name, pattern)
