"""A folder of compressed-tensors read as the dense model that it stands for, tensor by tensor.

What its config.json says is held against closed lists, or refused; nothing is looked up or run by
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from gblm.errors import CheckpointError
from gblm.export.legacy_layouts import (
    FP8,
    INT8,
    MARLIN,
    PARTS,
    BitmaskTensor,
    DenseCodes,
    MarlinTensor,
    Scaling,
)
from gblm.model.folder import (
    CODE_FORMATS,
    LEGACY_FORMATS,
    LEGACY_METHOD,
    ModelFolder,
    has_pruned_codes,
    quant_method,
)
from gblm.model.reader import Header, Reader
from gblm.sparse.formats import VALUE_DTYPES
from gblm.sparse.values import FLOAT, ValueType
from gblm.sparse.weights import SparseWeight

SCALE = "weight_scale"
# Tensors that quantise activations; ours stay floating.
ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
FOREIGN = ("compressed", "bitmask", "row_offsets", "weight_packed", "scale_packed")
REFUSED = {"weight_zero_point": "asymmetric codes", "weight_g_idx": "codes in another column order"}
PackedTensor = BitmaskTensor | MarlinTensor | DenseCodes


@dataclass(frozen=True)
class LegacyConfig:
    """Says how a folder's weights are stored.

    `layout` is a name of LEGACY_FORMATS. `scalings` says how scales may lie: "tensor", "channel",
    or the number of columns that share one; it is empty for floating values. `activations` tells
    whether activations were meant to be quantised, too.
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


class LegacyReader(Reader):
    """Reads tensors by the names of the dense model; packed ones are expanded.

    `packed` holds the tensors that are stored in parts, and `scalings` the scales of those that are
    codes, both by the name of the dense tensor. `owners` says of each part which dense tensor it
    belongs to; `unused` are stored tensors that quantise activations.
    """

    def __init__(self, folder: ModelFolder) -> None:
        """Read config.json, the headers and the parts `shape`, and hold them against each other.

        Args:
            folder: with a sparse format of compressed-tensors.

        Raises:
            CheckpointError: not of compressed-tensors, damaged, or no format that can be read.
        """
        self.legacy = LegacyConfig.of(folder.path, folder.config)
        super().__init__(folder)
        self.packed = {tensor.name: tensor for tensor in self._find()}
        if self.legacy.layout != "dense" and not self.packed:
            raise CheckpointError(
                f"{folder}: config.json says {self.legacy.layout}, but no tensor is stored so."
            )
        self.scalings = dict(self._find_scalings())
        self.owners = {
            f"{t.prefix}.{part}": t.name for t in self.packed.values() for part in t.parts
        }
        self.owners |= {_scale_name(name): name for name in self.scalings}
        activations = (name for name in self.headers if name.rpartition(".")[2] in ACTIVATIONS)
        self.unused = set(activations) if self.legacy.scalings else set[str]()
        headers = {
            name: header
            for name, header in self.headers.items()
            if name not in self.owners and name not in self.unused
        }
        self.headers = headers | dict(self._dense_headers(headers))

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors as the model in memory does; see Reader."""
        super().rename(names)
        self.packed = {names.get(name, name): tensor for name, tensor in self.packed.items()}
        self.scalings = {names.get(name, name): scale for name, scale in self.scalings.items()}

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, expanded if it is packed; see `Scaling.floats` for codes."""
        if name not in self.packed:
            return super().tensor(name)
        tensor = self.packed[name]
        dense = tensor.dense(self._parts(tensor))[0].reshape(tensor.shape)
        if name in self.scalings:
            return self.scalings[name].floats(dense, self._scales(name))
        return dense

    @property
    def has_fp8(self) -> bool:
        """Tell whether there are fp8 codes."""
        return any(scaling.codes == FP8 for scaling in self.scalings.values())

    def unpacked(self, module: str) -> Tensor:
        """Read a linear's weight as floats; see `Scaling.unpacked`."""
        name = f"{module}.weight"
        if name not in self.scalings:
            return self.tensor(name)
        dense = self.packed[name].dense(self._parts(self.packed[name]))[0]
        return self.scalings[name].unpacked(dense, self._scales(name))

    def mask(self, module: str) -> Tensor:
        """Read which weights of a linear are stored, or are not zero, [out, in] bool."""
        tensor = self.packed.get(f"{module}.weight")
        if tensor is None:
            return super().tensor(f"{module}.weight") != 0
        parts = self._parts(tensor)
        return tensor.mask(parts) if isinstance(tensor, BitmaskTensor) else tensor.dense(parts)[1]

    def values(self, module: str) -> ValueType:
        """Choose how we store a linear's values."""
        scaling = self.scalings.get(f"{module}.weight")
        return FLOAT if scaling is None else scaling.values

    def weight(self, module: str) -> SparseWeight:
        """Read a linear's weight with the mask of what is stored."""
        name = f"{module}.weight"
        tensor = self.packed.get(name)
        if tensor is None:
            return SparseWeight.from_zeros(super().tensor(name))
        dense, mask = tensor.dense(self._parts(tensor))
        if name in self.scalings:
            return self.scalings[name].weight(dense, mask, self._scales(name))
        return SparseWeight(dense, mask)

    def _parts(self, tensor: PackedTensor) -> dict[str, Tensor]:
        return {part: self._load(f"{tensor.prefix}.{part}") for part in tensor.parts}

    def _scales(self, name: str) -> Tensor:
        tensor = self.packed[name]
        if isinstance(tensor, MarlinTensor):
            return tensor.scales(self._load(f"{tensor.prefix}.scale_packed"))
        return self._load(_scale_name(tensor.name))

    def _find(self) -> Iterator[PackedTensor]:
        """Find every tensor that is stored in parts."""
        layout, names = self.legacy.layout, set[str]()
        own = MarlinTensor.parts if layout == MARLIN else PARTS.get(layout, ())
        if layout == "dense":
            for name, (shape, dtype) in self.headers.items():
                if name.endswith(".weight") and dtype in (INT8, FP8):
                    yield DenseCodes(name, shape, dtype)
        for prefix, headers in self._found(own).items():
            for part in own:
                if part not in headers:
                    raise CheckpointError(f"{self.folder}: {prefix}.{part} is missing.")
            tensor: PackedTensor
            if layout == MARLIN:
                tensor = MarlinTensor.of(prefix, headers)
            else:
                tensor = BitmaskTensor.of(prefix, layout, headers, self._shape(prefix, headers))
            if tensor.name in names:
                raise CheckpointError(f"{self.folder}: {tensor.name} is stored twice.")
            names.add(tensor.name)
            yield tensor

    def _found(self, own: tuple[str, ...]) -> dict[str, dict[str, Header]]:
        """Collect the parts' headers by what the names begin with."""
        found: dict[str, dict[str, Header]] = {}
        for name, header in self.headers.items():
            prefix, _, part = name.rpartition(".")
            if part in own:
                found.setdefault(prefix, {})[part] = header
            elif part in FOREIGN:
                raise CheckpointError(f"{self.folder}: {name} is no part of {self.legacy.layout}.")
        return found

    def _find_scalings(self) -> Iterator[tuple[str, Scaling]]:
        """Find the scales of every packed tensor that holds codes."""
        allowed = self.legacy.scalings
        for name, tensor in self.packed.items():
            scale = self.headers.get(_scale_name(name))
            if isinstance(tensor, MarlinTensor):
                scale = ((tensor.shape[0], tensor.groups), torch.float16)
                yield (
                    name,
                    Scaling.of(name, tensor.shape, tensor.dtype, scale, allowed, tensor.bits),
                )
            elif scale is not None:
                yield name, Scaling.of(name, tensor.shape, tensor.dtype, scale, allowed)
            elif tensor.dtype not in VALUE_DTYPES:
                raise CheckpointError(
                    f"{tensor.prefix}.compressed: values of {tensor.dtype} without scales; floats "
                    "are needed."
                )

    def _dense_headers(self, others: dict[str, Header]) -> Iterator[tuple[str, Header]]:
        """Give the headers of the dense tensors; refuse what is unknown beside the packed ones."""
        for name, tensor in self.packed.items():
            if name in others:
                raise CheckpointError(f"{self.folder}: {name} is stored twice, packed and dense.")
            scaling = self.scalings.get(name)
            yield name, (tensor.shape, tensor.dtype if scaling is None else scaling.floating)
        for name in others:
            part = name.rpartition(".")[2]
            if part in REFUSED:
                raise CheckpointError(f"{name}: {REFUSED[part]} are not converted.")
            if part == SCALE:
                raise CheckpointError(f"{name}: the scales of codes that are not stored sparse.")

    def _shape(self, prefix: str, headers: dict[str, Header]) -> list[int]:
        shape, dtype = headers["shape"]
        if dtype != torch.int64 or shape not in ((1,), (2,), (2, 1)):
            raise CheckpointError(f"{prefix}.shape: {list(shape)} {dtype} holds no shape.")
        return [int(size) for size in self._load(f"{prefix}.shape").reshape(-1)]


def _scale_name(name: str) -> str:
    return f"{name.removesuffix('weight')}{SCALE}"


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
    """Refuse all that is quantised, but for codes beneath a sparse layout."""
    groups, name = fields.get("config_groups"), fields.get("format")
    if layout != MARLIN and name not in CODE_FORMATS:
        known = ", ".join(CODE_FORMATS)
        _refuse(folder, f"codes stored as {str(name)[:40]!r} are not converted; {known} are.")
    if layout == "dense" and not has_pruned_codes(fields):
        _refuse(folder, "codes that are stored dense are converted where they are 2:4 only.")
    if fields.get("kv_cache_scheme"):
        _refuse(folder, "a quantised KV cache is not converted; its scales would be lost.")
    if not isinstance(groups, dict) or not all(isinstance(g, dict) for g in groups.values()):
        _refuse(folder, "config_groups are no groups of settings.")


def _scaling(folder: Path, weights: Any, bits: tuple[int, ...]) -> str | int:
    """Say how a group of linears has its scales; refuse all that codes and scales do not tell."""
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
