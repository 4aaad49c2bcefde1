"""A folder of compressed-tensors read as the dense model that it stands for, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from gblm.checkpoint.reader import Header, Reader
from gblm.errors import CheckpointError, InputError
from gblm.export.legacy_bitmask import PARTS, BitmaskTensor
from gblm.folder import LEGACY_FORMATS, LEGACY_METHOD, quant_method, read_config
from gblm.formats import VALUE_DTYPES
from gblm.weights import SparseWeight


class LegacyReader(Reader):
    """The tensors by the names of the dense model; packed ones are expanded when they are read.

    Attributes:
        layout: how config.json says the weights are stored: a name of LEGACY_FORMATS.
        packed: tensors that are stored in parts, by the name of the dense tensor.
        headers: shape and dtype by dense name.
    """

    def __init__(self, folder: Path) -> None:
        """Read config.json, the headers and the parts `shape`, and hold them against each other.

        Raises:
            CheckpointError: not of compressed-tensors, damaged, or no format that can be read.
        """
        self.layout = layout_of(folder, read_config(folder))
        super().__init__(folder)
        self.packed = {tensor.name: tensor for tensor in self._find()}
        if self.layout in PARTS and not self.packed:
            raise CheckpointError(
                f"{folder}: config.json says {self.layout}, but no tensor is stored so."
            )
        used = {f"{t.prefix}.{part}" for t in self.packed.values() for part in PARTS[t.layout]}
        headers = {name: header for name, header in self.headers.items() if name not in used}
        for name, tensor in self.packed.items():
            if name in headers:
                raise CheckpointError(f"{folder}: {name} is stored twice, packed and as it is.")
            headers[name] = (tensor.shape, tensor.dtype)
        self.headers = headers

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, expanded if it is packed."""
        if name not in self.packed:
            return super().tensor(name)
        tensor = self.packed[name]
        return tensor.dense(self._parts(tensor))[0].reshape(tensor.shape)

    def mask(self, module: str) -> Tensor:
        """What is stored of a linear's weight, [out, in] bool; of a dense one what is not zero."""
        tensor = self.packed.get(f"{module}.weight")
        if tensor is None:
            return super().tensor(f"{module}.weight") != 0
        return tensor.mask(self._parts(tensor))

    def weight(self, module: str) -> SparseWeight:
        """A linear's weight with the mask of what is stored."""
        tensor = self.packed.get(f"{module}.weight")
        if tensor is None:
            return SparseWeight.from_zeros(super().tensor(f"{module}.weight"))
        return SparseWeight(*tensor.dense(self._parts(tensor)))

    def _parts(self, tensor: BitmaskTensor) -> dict[str, Tensor]:
        return {part: self._load(f"{tensor.prefix}.{part}") for part in PARTS[tensor.layout]}

    def _find(self) -> Iterator[BitmaskTensor]:
        """Every tensor that is stored in parts, with all of them."""
        own = PARTS.get(self.layout, ())
        found: dict[str, dict[str, Header]] = {}
        for name, header in self.headers.items():
            prefix, _, part = name.rpartition(".")
            if part in own:
                found.setdefault(prefix, {})[part] = header
            elif part in ("compressed", "bitmask", "row_offsets"):
                raise CheckpointError(f"{self.folder}: {name} is no part of {self.layout}.")
        names = set[str]()
        for prefix, headers in found.items():
            for part in own:
                if part not in headers:
                    raise CheckpointError(f"{self.folder}: {prefix}.{part} is missing.")
            tensor = BitmaskTensor.of(prefix, self.layout, headers, self._shape(prefix, headers))
            if tensor.dtype not in VALUE_DTYPES:
                raise CheckpointError(
                    f"{prefix}.compressed: values have dtype {tensor.dtype}; floats are needed."
                )
            if tensor.name in names:
                raise CheckpointError(f"{self.folder}: {tensor.name} is stored twice.")
            names.add(tensor.name)
            yield tensor

    def _shape(self, prefix: str, headers: dict[str, Header]) -> list[int]:
        shape, dtype = headers["shape"]
        if dtype != torch.int64 or shape not in ((1,), (2,), (2, 1)):
            raise CheckpointError(f"{prefix}.shape: {list(shape)} {dtype} holds no shape.")
        return [int(size) for size in self._load(f"{prefix}.shape").reshape(-1)]


def layout_of(folder: Path, config: dict[str, Any]) -> str:
    """The name in LEGACY_FORMATS that config.json gives; nothing is looked up or run by it.

    Raises:
        CheckpointError: no checkpoint of compressed-tensors, or a format that is not converted.
    """

    def refuse(why: str) -> NoReturn:
        raise CheckpointError(f"{folder}: {why}")

    if quant_method(config) != LEGACY_METHOD:
        refuse(
            "packed neither by gblm nor by compressed-tensors; a dense model is packed with "
            "`gblm export pack`."
        )
    fields = config["quantization_config"]
    if fields.get("config_groups"):
        raise InputError(f"{folder}: quantised weights are not converted.")
    sparse = fields.get("sparsity_config")
    if not isinstance(sparse, dict):
        refuse("config.json has no sparsity_config: nothing in it is stored sparse.")
    name = sparse.get("format")
    if not isinstance(name, str) or name not in LEGACY_FORMATS:
        refuse(
            f"sparsity format {str(name)[:40]!r} is unknown; known are {', '.join(LEGACY_FORMATS)}."
        )
    return name
