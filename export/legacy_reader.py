"""A folder of compressed-tensors read as the dense model that it stands for, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from gblm.errors import CheckpointError
from gblm.export.legacy_bitmask import PARTS, BitmaskTensor
from gblm.export.legacy_codes import FP8, Scaling
from gblm.export.legacy_config import LegacyConfig
from gblm.export.legacy_marlin import MARLIN, MarlinTensor
from gblm.formats import VALUE_DTYPES
from gblm.model.folder import ModelFolder
from gblm.model.reader import Header, Reader
from gblm.values import FLOAT, ValueType
from gblm.weights import SparseWeight

SCALE = "weight_scale"
# Tensors that quantise activations; ours stay floating.
ACTIVATIONS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point")
FOREIGN = ("compressed", "bitmask", "row_offsets", "weight_packed", "scale_packed")
REFUSED = {"weight_zero_point": "asymmetric codes", "weight_g_idx": "codes in another column order"}
PackedTensor = BitmaskTensor | MarlinTensor


class LegacyReader(Reader):
    """The tensors by the names of the dense model; packed ones are expanded when they are read.

    Attributes:
        legacy: how config.json says the weights are stored.
        packed: tensors that are stored in parts, by the name of the dense tensor.
        scalings: of those that are stored as codes, likewise.
        headers: shape and dtype by dense name.
        owners: the dense tensor that a stored one is a part of.
        unused: stored tensors that quantise activations.
    """

    def __init__(self, folder: ModelFolder, rounds: bool = False) -> None:
        """Read config.json, the headers and the parts `shape`, and hold them against each other.

        Args:
            folder: with a sparse format of compressed-tensors.
            rounds: round the products of fp8 codes and scales instead of refusing them.

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
        self.scalings = {
            name: replace(scaling, rounds=rounds) for name, scaling in self._find_scalings()
        }
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
        """Whether there are fp8 codes."""
        return any(scaling.codes == FP8 for scaling in self.scalings.values())

    def check_scales(self) -> None:
        """Read all scales, and refuse those that no weight can be made of; reads no codes.

        Raises:
            CheckpointError: one is not positive.
            InputError: one does not fit.
        """
        for name, scaling in self.scalings.items():
            scaling.check(self._scales(name), self.packed[name].shape[0])

    def unpacked(self, module: str) -> Tensor:
        """A linear's weight as floats; see `Scaling.unpacked`."""
        name = f"{module}.weight"
        if name not in self.scalings:
            return self.tensor(name)
        dense = self.packed[name].dense(self._parts(self.packed[name]))[0]
        return self.scalings[name].unpacked(dense, self._scales(name))

    def mask(self, module: str) -> Tensor:
        """What is stored of a linear's weight, [out, in] bool; of a dense one what is not zero."""
        tensor = self.packed.get(f"{module}.weight")
        if tensor is None:
            return super().tensor(f"{module}.weight") != 0
        parts = self._parts(tensor)
        return tensor.mask(parts) if isinstance(tensor, BitmaskTensor) else tensor.dense(parts)[1]

    def values(self, module: str) -> ValueType:
        """How we store a linear's values."""
        scaling = self.scalings.get(f"{module}.weight")
        return FLOAT if scaling is None else scaling.values

    def weight(self, module: str) -> SparseWeight:
        """A linear's weight with the mask of what is stored."""
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
        return self._load(_scale_name(name))

    def _find(self) -> Iterator[PackedTensor]:
        """Every tensor that is stored in parts, with all of them."""
        layout, names = self.legacy.layout, set[str]()
        own = MarlinTensor.parts if layout == MARLIN else PARTS.get(layout, ())
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
        """The parts' headers by what the names begin with."""
        found: dict[str, dict[str, Header]] = {}
        for name, header in self.headers.items():
            prefix, _, part = name.rpartition(".")
            if part in own:
                found.setdefault(prefix, {})[part] = header
            elif part in FOREIGN:
                raise CheckpointError(f"{self.folder}: {name} is no part of {self.legacy.layout}.")
        return found

    def _find_scalings(self) -> Iterator[tuple[str, Scaling]]:
        """Every packed tensor that holds codes."""
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
        """What the packed tensors look like, once nothing unknown stands beside them."""
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
