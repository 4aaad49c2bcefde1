"""Models that others made, as the plugin packs them while loading. Imports nothing of vLLM.

Two kinds: sparse checkpoints of compressed-tensors, which no vLLM reads any more, and plain dense
folders whose zeros are already there. Nothing is written anywhere.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm.checkpoint.reader import Reader
from gblm.export.legacy import packable
from gblm.export.legacy_bitmask import ANY_MASK
from gblm.export.legacy_codes import FP8, ROUNDING
from gblm.export.legacy_reader import LegacyReader
from gblm.export.pack import MIN_SPARSITY, find_pattern
from gblm.folder import legacy_format, quant_method, read_config, resolve
from gblm.formats import Format, format_for, from_spec
from gblm.layers import StreamedLayers
from gblm.model import prunable, refuse_packed
from gblm.patterns import NM, Unstructured
from gblm.values import ValueType
from gblm.weights import SparseWeight

logger = logging.getLogger(__name__)

DENSE = from_spec("dense/dense")
# How a mask is called until its weight is there: the format bitmask holds any.
ANY = Unstructured(0.5)
SAMPLED_ROWS, SAMPLED_TENSORS = 64, 8


@dataclass(frozen=True)
class Foreign:
    """How the weights of one such model arrive.

    Attributes:
        source: its folder or hub id.
        revision: of the hub id.
        formats: of each linear that is to be packed, by full name: the one that its weight arrives
            in. DENSE stands for a plain weight.
        owners: the dense tensor that a stored one is a part of.
        unused: stored tensors that are not needed.
        stamp: another one when a file of weights has changed; the formats are found from them.
        keeps_fp8: whether fp8 codes arrive as codes where their scales fit.
    """

    source: str
    revision: str | None
    formats: Mapping[str, Format]
    owners: Mapping[str, str]
    unused: frozenset[str]
    stamp: str = ""
    keeps_fp8: bool = False

    @classmethod
    def open(cls, source: str, revision: str | None = None) -> Foreign:
        """Hold a folder's headers against its config.json.

        Args:
            source: a folder or hub id.
            revision: of the hub id.

        Raises:
            GblmError: whatever `gblm export legacy` or `gblm export pack` refuses before it reads
                weights, and scales that codes cannot be served with. fp8 codes stay codes where
                PyTorch is built for GPUs and their scales fit; else they are rounded.
        """
        folder, keeps = resolve(source, revision), built_for_gpus()
        if quant_method(read_config(folder)) is None:
            return cls(source, revision, _plain(folder), {}, frozenset(), _stamp(folder))
        with LegacyReader(folder, rounds=True, keeps_fp8=keeps) as reader:
            reader.refuse_unlisted()
            names = packable(reader, tuple(prunable(StreamedLayers(reader).model)))
            formats = {name: _legacy_format(reader, name) for name in names}
            for name, fmt in formats.items():
                rows, columns = reader.headers[f"{name}.weight"][0]
                if not is_plain(fmt):
                    fmt.check_shape(name, (rows, columns))
            _check_scales(reader, formats)
            unused = frozenset(reader.unused)
            return cls(source, revision, formats, reader.owners, unused, _stamp(folder), keeps)

    def format_of(self, module: str) -> Format | None:
        """The format that a module's weight arrives in; None when it is not packed."""
        return self.formats.get(module)

    def parts(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The stored tensors with names, in which the parts of packed ones are ours.

        The first part of a tensor stands for all of them: they are read from the folder together,
        so that no more than one weight is unpacked at a time.

        Args:
            weights: the stored tensors, in any order.

        Raises:
            CheckpointError: a weight is damaged.
            InputError: it has no exact form in our format.
        """
        reader: LegacyReader | None = None
        done = set[str]()
        for name, tensor in weights:
            owner = self.owners.get(name)
            if owner is None:
                if name not in self.unused:
                    yield name, tensor
            elif owner not in done:
                done.add(owner)
                if reader is None:
                    folder = resolve(self.source, self.revision)
                    reader = LegacyReader(folder, rounds=True, keeps_fp8=self.keeps_fp8)
                yield from self._read(reader, owner)
                reader.release()

    def _read(self, reader: LegacyReader, owner: str) -> Iterator[tuple[str, Tensor]]:
        module = owner.removesuffix(".weight")
        fmt = self.formats.get(module)
        if fmt is None:
            yield owner, reader.tensor(owner)
            return
        for part, tensor in fmt.pack(module, reader.weight(module)).items():
            yield f"{module}.{part}", tensor


def built_for_gpus() -> bool:
    """Whether vLLM serves on GPUs here: its builds for CPUs come with a PyTorch for CPUs."""
    return torch.version.cuda is not None or torch.version.hip is not None


def is_plain(fmt: Format) -> bool:
    """Whether a weight arrives, or stays, as one tensor of floats."""
    return fmt.spec == DENSE.spec


def is_legacy(config: dict[str, Any]) -> bool:
    """Whether the plugin serves a checkpoint of compressed-tensors; vLLM serves the others.

    Plain weights beside a `sparsity_config` are refused by vLLM when it names targets, and served
    when it does not.
    """
    name = legacy_format(config)
    return name is not None and (
        name != "dense" or bool(config["quantization_config"]["sparsity_config"].get("targets"))
    )


def settle(name: str, weight: SparseWeight, values: ValueType) -> tuple[Format, SparseWeight]:
    """The format of a weight, found from its zeros: the tightest N:M they follow, or a bitmask.

    Args:
        name: of the linear, for messages.
        weight: floating, or codes.
        values: how its values are stored.

    Returns:
        The format, DENSE for floats with too few zeros or with columns that no format holds; and
        the weight with the mask to pack.
    """
    if values.is_float:
        weight = SparseWeight(weight.weight, weight.weight != 0)
    zeros = 1 - int(weight.mask.count_nonzero()) / weight.mask.numel()
    if values.is_float and (zeros < MIN_SPARSITY or weight.mask.shape[1] % 8):
        return DENSE, weight
    found = find_pattern([(name, weight.mask)])
    if not isinstance(found, NM):
        # Rounded, so that all layers of a model share what is compiled for one.
        found = Unstructured(min(round(zeros, 1), 0.9))
    return format_for(found, values), weight


def sampled_zeros(reader: Reader) -> float:
    """The share of zeros in the first rows of some linears of the decoder layers, 0 to 1."""
    zeros = weights = 0
    names = [n for n, (shape, _) in reader.headers.items() if ".layers." in n and len(shape) == 2]
    for name in names[:SAMPLED_TENSORS]:
        rows = reader.tensor(name)[:SAMPLED_ROWS]
        zeros += int((rows == 0).sum())
        weights += rows.numel()
    return zeros / weights if weights else 0.0


def _stamp(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def _plain(folder: Path) -> dict[str, Format]:
    refuse_packed(folder)
    with Reader(folder) as reader:
        reader.refuse_unlisted()
        return dict.fromkeys(prunable(StreamedLayers(reader).model), DENSE)


def _check_scales(reader: LegacyReader, formats: Mapping[str, Format]) -> None:
    """What would be refused when weights are read; of those that become dense, the codes, too."""
    reader.check_scales()
    for name in reader.scalings:
        if name.removesuffix(".weight") not in formats:
            reader.tensor(name)
    if any(
        own.codes == FP8 and not (own.keeps and name.removesuffix(".weight") in formats)
        for name, own in reader.scalings.items()
    ):
        logger.warning("%s: %s.", reader.folder, ROUNDING)


def _legacy_format(reader: LegacyReader, name: str) -> Format:
    layout = reader.legacy.layout
    if layout == "dense":
        return DENSE
    return format_for(ANY if layout == ANY_MASK else NM(2, 4), reader.values(name))
