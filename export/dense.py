"""Export a packed folder as an ordinary dense HF folder with zeros, for every other tool."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm.checkpoint.write import ShardWriter, check_output, copy_side_files, new_folder
from gblm.files import write_json
from gblm.model.experts import fused_in_files
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
from gblm.model.reader import Cut
from gblm.packed import checked_skeleton
from gblm.progress import Progress, no_progress
from gblm.recipe import SHARD_SIZE, shard_bytes


def export_dense(
    source: ModelFolder,
    output: Path,
    overwrite: bool = False,
    progress: Progress = no_progress,
    dtype: torch.dtype | None = None,
    max_shard_size: str = SHARD_SIZE,
) -> dict[str, Any]:
    """Unpack every weight exactly, codes as what they stand for; the rest goes along.

    Args:
        source: a packed folder.
        output: the folder to make.
        overwrite: replace an existing folder.
        progress: for a progress bar.
        dtype: of what codes stand for, and of the model when it is loaded; in float32 codes times
            scales are exact. None: what config.json names.
        max_shard_size: of a file of weights, as `gblm.recipe.shard_bytes` reads it.

    Returns:
        Sizes and counts.

    Raises:
        CheckpointError: the weights are no model of config.json's sizes.
    """
    size = shard_bytes(max_shard_size)
    with PackedReader(source) as packed:
        fused = fused_in_files(checked_skeleton(packed))
        dense = sum(shape[0] * shape[1] * 4 for shape in (x.shape for x in packed.linears.values()))
        need = dense + sum(map(packed.num_bytes, packed.dense_names()))
        check_output(output, overwrite, need, source.path)
        with new_folder(output, overwrite) as folder:
            shards = ShardWriter(folder, size)
            for name, tensor in _unpacked(packed, fused, dtype, progress):
                shards.add(name, tensor)
            shards.finish()
            copy_side_files(source.path, folder)
            config = {k: v for k, v in source.config.items() if k != "quantization_config"}
            if dtype is not None:
                config = {k: v for k, v in config.items() if k != "torch_dtype"}
                config["dtype"] = str(dtype).removeprefix("torch.")
            write_json(folder / "config.json", config)
        return {
            "source": str(source),
            "output": str(output),
            "linears": len(packed.linears),
            "bytes_packed": sum(map(packed.num_bytes, packed)),
            "bytes_dense": shards.total_bytes,
        }


def _unpacked(
    packed: PackedReader,
    fused: Mapping[str, Mapping[str, Cut]],
    dtype: torch.dtype | None,
    progress: Progress,
) -> Iterator[tuple[str, Tensor]]:
    """Give all tensors as the family's files hold them, by the names there."""
    step = progress("unpacking", len(packed.linears))

    def weight(name: str) -> Tensor:
        linear = packed.linears.get(name.removesuffix(".weight"))
        if linear is None:
            return packed.tensor(name)
        parts = packed.parts(linear.name)
        linear.fmt.validate(linear.name, parts, linear.shape)
        step()
        return linear.fmt.expand(parts, dtype or packed.dtype)

    single = {name for cuts in fused.values() for name in cuts}
    for name in (*(f"{linear}.weight" for linear in packed.linears), *packed.dense_names()):
        if name not in single:
            yield packed.stored_name(name), weight(name)
    for name, head in packed.tied.items():  # as they are looked up, whatever the weights' dtype
        yield packed.stored_name(name), packed.weight(head)
    for whole, cuts in fused.items():
        yield whole, _fuse([(cut, weight(name)) for name, cut in cuts.items()])


def _fuse(matrices: Sequence[tuple[Cut, Tensor]]) -> Tensor:
    """Put the experts' matrices into the tensor that a family's files hold them in."""
    first, matrix = matrices[0]
    whole = torch.empty(first.shape, dtype=matrix.dtype)
    for cut, matrix in matrices:
        cut.put(matrix, whole)
    return whole
