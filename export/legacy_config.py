"""What config.json of a compressed-tensors folder says, as far as it is converted; else a refusal.

Every name is held against a closed list; nothing is looked up or run by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gblm.errors import CheckpointError
from gblm.export.legacy_marlin import MARLIN
from gblm.model.folder import LEGACY_FORMATS, LEGACY_METHOD, quant_method

# How codes may be stored beneath a sparse layout.
CODE_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")


@dataclass(frozen=True)
class LegacyConfig:
    """How a folder's weights are stored.

    Attributes:
        layout: a name of LEGACY_FORMATS.
        scalings: how scales may lie: "tensor", "channel", or columns that share a scale; empty for
            floating values.
        activations: whether activations were meant to be quantised, too.
    """

    layout: str
    scalings: frozenset[str | int] = frozenset()
    activations: bool = False

    @classmethod
    def of(cls, folder: Path, config: dict[str, Any]) -> LegacyConfig:
        """Read the "quantization_config" of a config.json.

        Raises:
            CheckpointError: not of compressed-tensors, or a format that is not converted.
        """
        if quant_method(config) != LEGACY_METHOD:
            raise CheckpointError(
                f"{folder}: packed neither by gblm nor by compressed-tensors; a dense model is "
                "packed with `gblm export pack`."
            )
        fields = config["quantization_config"]
        layout = _layout(folder, fields)
        groups = fields.get("config_groups")
        if not groups and layout != MARLIN:
            return cls(layout)
        _check_codes(folder, layout, fields)
        activations = any(group.get("input_activations") for group in groups.values())
        bits = (4, 8) if layout == MARLIN else (8,)
        scalings = (_scaling(folder, group.get("weights"), bits) for group in groups.values())
        return cls(layout, frozenset(scalings), activations)


def _refuse(folder: Path, why: str) -> NoReturn:
    raise CheckpointError(f"{folder}: {why}")


def _layout(folder: Path, fields: dict[str, Any]) -> str:
    if fields.get("format") == MARLIN:
        return MARLIN
    sparse = fields.get("sparsity_config")
    if not isinstance(sparse, dict):
        _refuse(folder, "config.json has no sparsity_config: nothing in it is stored sparse.")
    name = sparse.get("format")
    if not isinstance(name, str) or name not in LEGACY_FORMATS:
        known = ", ".join(LEGACY_FORMATS)
        _refuse(folder, f"sparsity format {str(name)[:40]!r} is unknown; known are {known}.")
    return name


def _check_codes(folder: Path, layout: str, fields: dict[str, Any]) -> None:
    """Codes beneath a sparse layout, and nothing else that is quantised."""
    groups, name = fields.get("config_groups"), fields.get("format")
    if layout == "dense":
        _refuse(folder, "quantised weights that are stored dense are no sparse checkpoint.")
    if layout != MARLIN and name not in CODE_FORMATS:
        known = ", ".join(CODE_FORMATS)
        _refuse(folder, f"codes stored as {str(name)[:40]!r} are not converted; {known} are.")
    if fields.get("kv_cache_scheme"):
        _refuse(folder, "a quantised KV cache is not converted; its scales would be lost.")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        _refuse(folder, "config_groups are no groups of settings.")


def _scaling(folder: Path, weights: Any, bits: tuple[int, ...]) -> str | int:
    """How a group of linears has its scales; refuses all that codes and scales do not tell."""
    if not isinstance(weights, dict):
        _refuse(folder, "config_groups have no settings for weights.")
    off = (None, False)
    wanted: dict[str, tuple[object, ...]] = {
        "num_bits": bits, "type": ("int", "float"), "symmetric": (True,),
        "actorder": off, "dynamic": off,
    }  # fmt: skip
    for key, values in wanted.items():
        if weights.get(key) not in values:
            _refuse(
                folder,
                f"weights with {key} {str(weights.get(key))[:40]!r} are not converted; symmetric "
                "int8 or fp8 codes in column order are, and int4 ones in marlin-24.",
            )
    strategy, size = weights.get("strategy"), weights.get("group_size")
    if strategy == "group" and isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    if strategy not in ("tensor", "channel"):
        found = str(strategy)[:40]
        _refuse(folder, f"scales by {found!r} are not converted; tensor, channel and group are.")
    return str(strategy)
