"""METHODS: every pruning method by name."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from gblm.errors import UsageError
from gblm.methods.alps import ALPS
from gblm.methods.base import Method, ScoredMethod, Stats
from gblm.methods.scores import GBLM, Magnitude, Wanda
from gblm.methods.sparsegpt import SparseGPT

__all__ = ["METHODS", "Flag", "Method", "ScoredMethod", "Stats", "flags", "make_method"]

METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "alps": ALPS,
    "gblm": GBLM,
}


class Flag(NamedTuple):
    """A hyper-parameter that the command line offers, for all methods that have it.

    Attributes:
        name: of the dataclass field.
        kind: its declared type: float, int, bool or a Literal of strings.
        help: which methods take it, and what it does there.
    """

    name: str
    kind: Any
    help: str


def flags() -> list[Flag]:
    """Give every field with an "about" once, in the order of METHODS."""
    found: dict[str, Flag] = {}
    for method, kind in METHODS.items():
        types = get_type_hints(kind)
        for field in dataclasses.fields(kind):  # type: ignore[arg-type]
            if "about" in field.metadata:
                first = found.get(field.name)
                own = f"{method}: {field.metadata['about']} (default {field.default})."
                text = own if first is None else f"{method}, {first.help}"
                found[field.name] = Flag(field.name, types[field.name], text)
    return list(found.values())


def make_method(name: str, options: dict[str, Any]) -> Method:
    """Build a method from its name and its dataclass fields.

    Raises:
        UsageError: the method or one of the options is unknown, or a value does not suit it.
    """
    if name not in METHODS:
        raise UsageError(f"method {name!r} is unknown: choose from {', '.join(METHODS)}.")
    types = get_type_hints(METHODS[name])
    known = [field.name for field in dataclasses.fields(METHODS[name])]  # type: ignore[arg-type]
    for option, value in options.items():
        if option not in known:
            takes = ", ".join(known) if known else "no options"
            raise UsageError(
                f"method {name} does not know the option {option!r}; it takes {takes}."
            )
        _check_type(f"method {name}: option {option}", value, types[option])
    return METHODS[name](**options)


def _check_type(what: str, value: Any, declared: Any) -> None:
    """Raise UsageError unless a value has a field's declared type; ranges are the method's own."""
    if get_origin(declared) is Literal:
        if value not in get_args(declared):
            choices = " or ".join(get_args(declared))
            raise UsageError(f"{what} is {value!r}: use {choices}.")
    # An int will do for a float; True is an int to Python, but not to a reader of recipes.
    elif type(value) is not declared and not (declared is float and type(value) is int):
        raise UsageError(f"{what} is {value!r}: it must be of type {declared.__name__}.")
