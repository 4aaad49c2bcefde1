"""Choices: the pattern and value type of each linear, settled from the recipe up front."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from gblm.errors import UsageError
from gblm.formats import Format, format_for, join_formats
from gblm.formats.manifest import MAX_GROUPS
from gblm.patterns import Pattern, parse
from gblm.recipe import LayerChoice, Recipe
from gblm.values import FLOAT, ValueType, parse_values

# Last parts of the names of linears with the same input, which servers multiply as one.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Choice:
    """What one linear is pruned to.

    Attributes:
        pattern: which positions may stay.
        values: how they are stored, `resolve`d for the linear's columns.
    """

    pattern: Pattern
    values: ValueType = FLOAT

    @property
    def fmt(self) -> Format:
        """The format that stores it."""
        return format_for(self.pattern, self.values)


def choose(recipe: Recipe, linears: Mapping[str, nn.Linear]) -> dict[str, Choice]:
    """Settle the pattern and the value type of every linear to prune.

    Args:
        recipe: its `layers` decide, the first that matches; else its own pattern and values.
        linears: to prune, by full name, in order.

    Returns:
        A choice for each of them, in the same order.

    Raises:
        PatternError: a pattern or value type is unknown, or columns do not divide into groups.
        UsageError: an entry of `layers` has no effect, or parts of a fused linear do not go
            together.
    """
    _check_globs(recipe.layers, linears)
    own = LayerChoice(targets=("*",))
    decided: set[LayerChoice] = set()
    chosen = {}
    for name, linear in linears.items():
        layer = next((layer for layer in recipe.layers if matches(name, layer.targets)), own)
        decided.add(layer)
        values = parse_values(layer.values or recipe.values)
        pattern = parse(layer.pattern or recipe.pattern)
        chosen[name] = Choice(pattern, values.resolve(name, linear.in_features))
    for layer in recipe.layers:
        if layer not in decided:
            raise UsageError(
                f"recipe: layers {', '.join(layer.targets)!r} come after others that match the "
                "same linears, and have no effect. The first that matches decides."
            )
    _check_fused(chosen)
    _check_count(chosen)
    return chosen


def patterns_of(choices: Mapping[str, Choice]) -> list[Pattern]:
    """Each pattern once, in order."""
    return list(dict.fromkeys(choice.pattern for choice in choices.values()))


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether a glob matches the full name of a module, or the end of it after a dot."""
    return any(fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}") for glob in globs)


def _check_globs(layers: Iterable[LayerChoice], names: Iterable[str]) -> None:
    every = list(names)
    for glob in (glob for layer in layers for glob in layer.targets):
        if not any(matches(name, (glob,)) for name in every):
            raise UsageError(
                f"recipe: layers {glob!r} matches no linear that is pruned; the first one is "
                f"{every[0]}."
            )


def _check_fused(choices: Mapping[str, Choice]) -> None:
    """Refuse what vLLM could not serve; a part that stays unpruned is told of when it is served."""
    for name in choices:
        parent, _, last = name.rpartition(".")
        for parts in (parts for parts in FUSED if parts[0] == last):
            found = {part: choices.get(f"{parent}.{part}") for part in parts}
            formats = {part: choice.fmt for part, choice in found.items() if choice}
            if join_formats(formats.values()) is None:
                ways = ", ".join(f"{part} {fmt.spec}" for part, fmt in formats.items())
                raise UsageError(
                    f"recipe: {parent}: {ways} are one linear when they are served, and must "
                    "have the same format and values. Sparsities alone may differ."
                )


def _check_count(choices: Mapping[str, Choice]) -> None:
    """The manifest has a group for each, and perhaps one for the head."""
    count = len(set(choices.values()))
    if count >= MAX_GROUPS:
        raise UsageError(
            f"recipe: layers ask for {count} different patterns and values; a packed model has at "
            f"most {MAX_GROUPS - 1}."
        )
