"""The decoder layers of a causal language model, and which of their linears can be pruned.

Nothing here is per model: decoder layers are found by type and count, linears by `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from gblm.errors import InputError, UsageError
from gblm.model.experts import routers
from gblm.recipe import matches


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Find the decoder layers and their name, such as "model.layers".

    Only the text decoder's own layers count: a tower beside it may have as many.

    Raises:
        InputError: no list of `num_hidden_layers` modules that hold an nn.Linear.
    """
    whole: Any = model
    count = getattr(whole.config.get_text_config(), "num_hidden_layers", None)
    of_text = set(whole.get_decoder().modules())
    for name, module in model.named_modules():
        if (
            module in of_text
            and isinstance(module, nn.ModuleList)
            and len(module) == count
            and any(isinstance(part, nn.Linear) for part in module.modules())
        ):
            return name, module
    raise InputError(
        f"{type(model).__name__} has no decoder layers with nn.Linear weights: "
        "gblm prunes LLaMA-like causal language models."
    )


def towers(model: nn.Module) -> list[str]:
    """Name what a multimodal model has beside its text decoder, such as "vision_tower"."""
    whole: Any = model
    text, outer = whole.get_decoder(), whole.base_model
    if text is outer:
        return []
    parts = outer.named_children()
    return [
        name for name, part in parts if part is not text and any(True for _ in part.parameters())
    ]


def hidden_size(model: nn.Module) -> int:
    """Return the width of the hidden states."""
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of a decoder layer by local name, such as "self_attn.q_proj".

    What routes tokens to experts is none of them.
    """
    left_out = routers(layer)
    found = layer.named_modules()
    return {name: m for name, m in found if isinstance(m, nn.Linear) and m not in left_out}


def prunable(model: nn.Module, ignore: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
    """Choose the linears to prune, by full name.

    Raises:
        UsageError: a pattern matches no linear, or none is left.
    """
    names = dict(_named_linears(model))
    for glob in ignore:
        if not any(matches(name, (glob,)) for name in names):
            raise UsageError(
                f"--ignore {glob!r} matches no linear; the first one is {next(iter(names))}."
            )
    chosen = {name: linear for name, linear in names.items() if not matches(name, ignore)}
    if not chosen:
        raise UsageError("--ignore leaves no linear to prune.")
    return chosen


def _named_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    prefix, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        found = linears(layer)
        _refuse_other_matrices(f"{prefix}.{index}", layer, found)
        for name, linear in found.items():
            yield f"{prefix}.{index}.{name}", linear


def _refuse_other_matrices(prefix: str, layer: nn.Module, found: dict[str, nn.Linear]) -> None:
    """Refuse weights that are no nn.Linear and would silently stay dense, as unknown experts'."""
    known = {f"{name}.weight" for name in found}
    routing = {parameter for router in routers(layer) for parameter in router.parameters()}
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 1 and name not in known and parameter not in routing:
            raise InputError(
                f"{prefix}.{name} {list(parameter.shape)} is no weight of an nn.Linear (fused "
                "mixture-of-experts weights are not): gblm does not prune this architecture."
            )
