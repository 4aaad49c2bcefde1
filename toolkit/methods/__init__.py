"""METHODS: every pruning method by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from gblm.errors import UsageError
from gblm.methods.base import Method, ScoredMethod, Stats
from gblm.methods.gblm import GBLM
from gblm.methods.magnitude import Magnitude
from gblm.methods.wanda import Wanda

__all__ = ["METHODS", "Method", "ScoredMethod", "Stats", "make_method"]

METHODS: dict[str, type[Method]] = {"magnitude": Magnitude, "wanda": Wanda, "gblm": GBLM}


def make_method(name: str, options: dict[str, Any]) -> Method:
    """Build a method from its name and its dataclass fields.

    Raises:
        UsageError: the method or one of the options is unknown.
    """
    if name not in METHODS:
        raise UsageError(f"method {name!r} is unknown: choose from {', '.join(METHODS)}.")
    known = [field.name for field in dataclasses.fields(METHODS[name])]  # type: ignore[arg-type]
    for option in options:
        if option not in known:
            takes = ", ".join(known) if known else "no options"
            raise UsageError(
                f"method {name} does not know the option {option!r}; it takes {takes}."
            )
    return METHODS[name](**options)
