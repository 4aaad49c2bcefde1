"""Shapes of a run: what stands in headers, config.json and recipe. No weight is read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gblm.checkpoint.head import Head
from gblm.checkpoint.write import NOT_COPIED, SIDE_FILES
from gblm.model.layers import StreamedLayers
from gblm.model.linears import hidden_size, linears
from gblm.model.reader import Reader
from gblm.prune.job import Job
from gblm.recipe import FUSED, Choice
from gblm.sparse.formats import Format

# Linears that are handed the same tensor as another one, by the last part of their name.
SAME_INPUT = {part: parts[0] for parts in FUSED for part in parts}


@dataclass(frozen=True)
class Linear:
    """One linear of a decoder layer.

    Attributes:
        rows: outputs.
        columns: inputs.
        inputs: equal for linears of a layer that share their input.
        choice: what the recipe prunes it to; None leaves it as it is.
        stored: bytes in the checkpoint.
        packed: bytes in the output; `stored` if it is not pruned.
    """

    rows: int
    columns: int
    inputs: str
    choice: Choice | None
    stored: int
    packed: int

    @property
    def weights(self) -> int:
        """How many."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its linears, all its parameters, their bytes in the checkpoint."""

    linears: tuple[Linear, ...]
    parameters: int
    stored: int

    @property
    def pruned(self) -> list[Linear]:
        """The linears to prune."""
        return [linear for linear in self.linears if linear.choice]

    @property
    def weights(self) -> int:
        """Of the linears to prune."""
        return sum(linear.weights for linear in self.pruned)

    @property
    def others(self) -> int:
        """Parameters that are no weight of a linear: norms and biases."""
        return self.parameters - sum(linear.weights for linear in self.linears)

    @property
    def packed(self) -> int:
        """Bytes of the pruned linears in the output."""
        return sum(linear.packed for linear in self.pruned)

    def groups(self, pruned: bool) -> list[list[Linear]]:
        """The linears to prune, or all of them, by shared input, in order."""
        found: dict[str, list[Linear]] = {}
        for linear in self.pruned if pruned else self.linears:
            found.setdefault(linear.inputs, []).append(linear)
        return list(found.values())


@dataclass(frozen=True)
class Shapes:
    """What memory, disk and time follow from.

    Attributes:
        layers: the decoder layers.
        names: full names of the linears to prune.
        hidden: width of the hidden states.
        vocab: width of the logits.
        dtype: of the computation.
        stored_dtype: of the checkpoint's linears.
        frame: parameters outside the layers, without the head.
        head: parameters of the head; 0 if it is the embeddings.
        packed_head: the head as the output has it, when it is stored as codes.
        stored: bytes of all tensors of the checkpoint.
        side_files: bytes of the files that are copied along.
        tensors: how many the checkpoint holds.
        samples: calibration sequences of one rank; 0 without text.
        batch: of them per forward pass.
        seq_len: tokens per sequence.
    """

    layers: tuple[Layer, ...]
    names: tuple[str, ...]
    hidden: int
    vocab: int
    dtype: torch.dtype
    stored_dtype: torch.dtype
    frame: int
    head: int
    packed_head: Head | None
    stored: int
    side_files: int
    tensors: int
    samples: int
    batch: int
    seq_len: int

    @property
    def chosen(self) -> dict[Choice, list[Linear]]:
        """The linears to prune, by what they are pruned to, in order."""
        found: dict[Choice, list[Linear]] = {}
        for linear in (linear for layer in self.layers for linear in layer.pruned):
            if linear.choice is not None:
                found.setdefault(linear.choice, []).append(linear)
        return found

    @property
    def largest(self) -> Layer:
        """The decoder layer with the most weights, of those with linears to prune."""
        return max(self.layers, key=lambda layer: (bool(layer.pruned), layer.parameters))

    @property
    def output(self) -> int:
        """Bytes of all tensors of the output."""
        changed = (linear for layer in self.layers for linear in layer.pruned)
        head = self.packed_head.added_bytes if self.packed_head else 0
        return self.stored + head + sum(linear.packed - linear.stored for linear in changed)

    @property
    def tokens(self) -> int:
        """Of one forward pass."""
        return self.batch * self.seq_len

    def hidden_states(self, sequences: int) -> int:
        """Bytes of what enters one decoder layer."""
        return sequences * self.seq_len * self.hidden * self.dtype.itemsize


def read_shapes(job: Job) -> Shapes:
    """Read headers and config.json, and lay out what the recipe does with them.

    Args:
        job: opened and checked.
    """
    model, choices, ranks = job.layers, job.choices, job.ranks.size
    reader = model.reader
    layers = tuple(_layer(model, i, reader, choices) for i in range(len(model)))
    frame, head = _outside(model)
    text: Any = model.model.config
    samples, batch, calibration = 0, 1, job.recipe.calibration
    if calibration is not None:
        batch = min(calibration.batch_size, calibration.num_samples)
        if calibration.order == "sequential":
            batch = math.ceil(calibration.num_samples / ranks)
        samples = batch * math.ceil(math.ceil(calibration.num_samples / batch) / ranks)
    return Shapes(
        layers=layers,
        names=tuple(choices),
        hidden=hidden_size(model.model),
        vocab=int(text.get_text_config().vocab_size),
        dtype=model.dtype,
        stored_dtype=reader.headers[f"{next(iter(choices))}.weight"][1],
        frame=frame,
        head=head,
        packed_head=job.head,
        stored=sum(map(reader.num_bytes, reader)),
        side_files=_side_files(reader),
        tensors=len(reader.headers),
        samples=samples,
        batch=batch,
        seq_len=calibration.seq_len if calibration is not None else 0,
    )


def _layer(
    model: StreamedLayers, index: int, reader: Reader, choices: Mapping[str, Choice]
) -> Layer:
    prefix = model.name(index)
    found = []
    for local, linear in linears(model.modules[index]).items():
        name, parent = f"{prefix}.{local}", local.rpartition(".")
        rows, columns = linear.weight.shape
        dtype, stored = reader.headers[f"{name}.weight"][1], reader.num_bytes(f"{name}.weight")
        choice = choices.get(name)
        packed = packed_bytes(choice.fmt, (rows, columns), dtype) if choice else stored
        inputs = f"{parent[0]}.{SAME_INPUT.get(parent[2], parent[2])}"
        found.append(Linear(rows, columns, inputs, choice, stored, packed))
    state = model.modules[index].state_dict()
    stored = sum(reader.num_bytes(f"{prefix}.{local}") for local in state)
    return Layer(tuple(found), sum(t.numel() for t in state.values()), stored)


def packed_bytes(fmt: Format, shape: tuple[int, int], dtype: torch.dtype) -> int:
    """Bytes of one packed weight [out, in]; dtype is that of floating values."""
    kept = shape[0] * shape[1] - int(shape[0] * shape[1] * fmt.pattern.sparsity)
    if fmt.values.in_nibbles:
        kept = shape[0] * math.ceil(kept / shape[0] / 2)  # bytes; every row starts at one
    specs = fmt.layout(shape, dtype).values()
    return sum(
        math.prod(kept if side == -1 else side for side in spec.shape) * spec.dtype.itemsize
        for spec in specs
    )


def _outside(model: StreamedLayers) -> tuple[int, int]:
    """Parameters outside the decoder layers: without the head, and of the head alone."""
    parts = {id(p): p for n, p in model.model.named_parameters() if not n.startswith(model.prefix)}
    base = {id(p) for p in model.model.base_model.parameters()}
    frame = sum(p.numel() for key, p in parts.items() if key in base)
    return frame, sum(p.numel() for p in parts.values()) - frame


def _side_files(reader: Reader) -> int:
    found = {file for glob in SIDE_FILES for file in reader.folder.path.glob(glob)}
    return sum(file.stat().st_size for file in found if file.name not in NOT_COPIED)
