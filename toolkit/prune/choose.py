"""Choose: the format of every linear to prune, which says its pattern and how values are stored."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from gblm.errors import UsageError
from gblm.recipe import FUSED, LayerChoice, Recipe, matches
from gblm.sparse.formats import Format, format_for, join_formats
from gblm.sparse.formats.manifest import MAX_GROUPS
from gblm.sparse.patterns import parse
from gblm.sparse.values import parse_values

logger = logging.getLogger(__name__)
# With more, what is left to prune is no longer what the recipe's pattern says.
DENSE_SHARE = 0.25


def choose(
    recipe: Recipe, linears: Mapping[str, nn.Linear], decoder_layers: Sequence[str]
) -> dict[str, Format]:
    """Settle the pattern and the value type of every linear to prune.

    Args:
        recipe: its `layers` decide, the first that matches; then `dense_ends`; else its own
            pattern and values.
        linears: to prune, by full name, in order.
        decoder_layers: full names of the modules, in order.

    Returns:
        A format for each of them, which says both, in the same order.

    Raises:
        PatternError: a pattern or value type is unknown, or columns do not divide into groups.
        UsageError: an entry of `layers` has no effect, or parts of a fused linear do not go
            together.
    """
    _check_globs(recipe.layers, linears)
    rest = [*_ends(recipe, decoder_layers), LayerChoice(targets=("*",))]
    decided: set[LayerChoice] = set()
    chosen = {}
    # A search names each linear in full, of a mixture thousands: those need no pattern matching.
    choices = [(layer, *_split(layer.targets, linears)) for layer in (*recipe.layers, *rest)]
    for name, linear in linears.items():
        layer = next(layer for layer, own, globs in choices if name in own or matches(name, globs))
        decided.add(layer)
        values = parse_values(layer.values or recipe.values)
        pattern = parse(layer.pattern or recipe.pattern)
        chosen[name] = format_for(pattern, values.resolve(name, linear.in_features))
    for layer in recipe.layers:
        if layer not in decided:
            raise UsageError(
                f"recipe: layers {', '.join(layer.targets)!r} come after others that match the "
                "same linears, and have no effect. The first that matches decides."
            )
    _check_fused(chosen)
    _check_count(chosen)
    return chosen


def _ends(recipe: Recipe, decoder_layers: Sequence[str]) -> list[LayerChoice]:
    """Leave first and last decoder layers dense, where the model has enough of them."""
    count = recipe.dense_ends
    if not count or recipe.pattern == "dense":
        return []
    if 2 * count > DENSE_SHARE * len(decoder_layers):
        logger.info("all of the %d decoder layers are pruned, also the ends", len(decoder_layers))
        return []
    names = (*decoder_layers[:count], *decoder_layers[-count:])
    return [LayerChoice(targets=tuple(f"{name}.*" for name in names), pattern="dense")]


def _split(
    targets: Iterable[str], linears: Collection[str]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Tell full names of linears from globs."""
    every = tuple(targets)
    own = frozenset(name for name in every if name in linears)
    return own, tuple(glob for glob in every if glob not in own)


def _check_globs(layers: Iterable[LayerChoice], linears: Collection[str]) -> None:
    for glob in (glob for layer in layers for glob in _split(layer.targets, linears)[1]):
        if not any(matches(name, (glob,)) for name in linears):
            raise UsageError(
                f"recipe: layers {glob!r} matches no linear that is pruned; the first one is "
                f"{next(iter(linears))}."
            )


def _check_fused(chosen: Mapping[str, Format]) -> None:
    """Refuse what vLLM could not serve; a part that stays unpruned is told of when it is served."""
    for name in chosen:
        parent, _, last = name.rpartition(".")
        for parts in (parts for parts in FUSED if parts[0] == last):
            found = {part: chosen.get(f"{parent}.{part}") for part in parts}
            formats = {part: fmt for part, fmt in found.items() if fmt}
            if join_formats(formats.values()) is None:
                ways = ", ".join(f"{part} {fmt.spec}" for part, fmt in formats.items())
                raise UsageError(
                    f"recipe: {parent}: {ways} are one linear when they are served, and must "
                    "have the same format and values. Sparsities alone may differ."
                )


def _check_count(chosen: Mapping[str, Format]) -> None:
    """Refuse more ways than the manifest has groups for, one of them for the head."""
    count = len(set(chosen.values()))
    if count >= MAX_GROUPS:
        raise UsageError(
            f"recipe: layers ask for {count} different patterns and values; a packed model has at "
            f"most {MAX_GROUPS - 1}."
        )
