"""A packed model folder read back: the manifest, the packed linears, the dense rest.

config.json (with the manifest) · safetensors · recipe.json · sparsity_report.json ·
MANIFEST.json (sha256 of all files) · README.md (model card) · tokenizer files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from gblm.errors import CheckpointError
from gblm.model.folder import ModelFolder
from gblm.model.reader import Header, Reader
from gblm.sparse.formats import VALUE_DTYPES, Format, Shape
from gblm.sparse.formats.manifest import Manifest

MANIFEST_FILE = "MANIFEST.json"
RECIPE_FILE = "recipe.json"
REPORT_FILE = "sparsity_report.json"


@dataclass(frozen=True)
class PackedLinear:
    """A PackedLinear is one packed weight as the headers describe it."""

    name: str
    fmt: Format
    shape: Shape
    headers: dict[str, Header]


class PackedReader(Reader):
    """The reader opens a packed folder: the manifest, the packed linears, the dense rest."""

    def __init__(self, folder: ModelFolder) -> None:
        """Read the manifest and the headers, and check one against the other.

        Raises:
            CheckpointError: no manifest of ours, or parts are missing or misshapen.
        """
        folder.check_current()
        self.manifest = Manifest.from_config(folder.config.get("quantization_config"))
        super().__init__(folder)
        self.refuse_unlisted()
        if self.unlisted:
            raise CheckpointError(
                f"{self.unlisted[0]}: is in a shard for which the index does not list it; pack the "
                "model again."
            )
        self.linears = {linear.name: linear for linear in self._find_linears()}
        if not self.linears:
            raise CheckpointError(f"{folder}: the manifest names no weight that is there.")
        self.tied = {f"{name}.weight": head for name, head in self.manifest.tied.items()}
        for name, head in self.tied.items():
            if name in self or head not in self.linears:
                raise CheckpointError(
                    f"{folder}: {name} is the packed {head}, says the manifest, but "
                    f"{'it is stored as well' if name in self else 'that is missing'}."
                )

    @property
    def dtype(self) -> torch.dtype:
        """Name the dtype that codes are expanded to: what config.json says, or bfloat16."""
        named = self.folder.dtype
        return next((dtype for dtype in VALUE_DTYPES if str(dtype) == named), torch.bfloat16)

    def weight(self, name: str) -> torch.Tensor:
        """Expand one packed linear to its dense weight [out, in]; codes in `dtype`."""
        return self.linears[name].fmt.expand(self.parts(name), self.dtype)

    def parts(self, name: str) -> dict[str, torch.Tensor]:
        """Read the parts of one packed linear."""
        return {part: self.tensor(f"{name}.{part}") for part in self.linears[name].headers}

    def dense_names(self) -> list[str]:
        """Name the tensors that are stored as they are."""
        packed = {f"{n}.{part}" for n, linear in self.linears.items() for part in linear.headers}
        return [name for name in self if name not in packed]

    def _find_linears(self) -> Iterator[PackedLinear]:
        """Find every module that the manifest names; refuse missing and further packed parts."""
        found: dict[str, dict[str, Header]] = {}
        formats: dict[str, Format] = {}
        for tensor in self:
            name, _, part = tensor.rpartition(".")
            fmt = self.manifest.format_of(name)
            if fmt is None:
                if part in ("values", "bitmask"):
                    raise CheckpointError(f"{tensor}: packed, but the manifest does not name it.")
            elif part == "weight":
                raise CheckpointError(f"{name}: stored dense, but the manifest says {fmt.name}.")
            elif part in fmt.parts:
                formats[name] = fmt
                found.setdefault(name, {})[part] = self.headers[tensor]
        for name, headers in found.items():
            yield _packed_linear(name, formats[name], headers)


def _packed_linear(name: str, fmt: Format, headers: dict[str, Header]) -> PackedLinear:
    for part in fmt.parts:
        if part not in headers:
            raise CheckpointError(f"{name}: the part {part!r} of format {fmt.spec} is missing.")
    shape = fmt.shape_of(name, headers)
    fmt.check_shape(name, shape)
    fmt.check_layout(name, headers, shape)
    return PackedLinear(name, fmt, shape, headers)
