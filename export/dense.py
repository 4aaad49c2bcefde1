"""Export a packed folder as an ordinary dense HF folder with zeros, for every other tool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gblm.checkpoint.write import ShardWriter, check_output, copy_side_files, new_folder
from gblm.files import write_json
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
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
    """
    size = shard_bytes(max_shard_size)
    with PackedReader(source) as packed:
        dense = sum(shape[0] * shape[1] * 4 for shape in (x.shape for x in packed.linears.values()))
        need = dense + sum(map(packed.num_bytes, packed.dense_names()))
        check_output(output, overwrite, need, source.path)
    with PackedReader(source) as packed, new_folder(output, overwrite) as folder:
        shards = ShardWriter(folder, size)
        step = progress("unpacking", len(packed.linears))
        for name, linear in packed.linears.items():
            parts = packed.parts(name)
            linear.fmt.check_readable(name, parts, linear.shape)
            shards.add(f"{name}.weight", linear.fmt.expand(parts, dtype or packed.dtype))
            step()
        for name in packed.dense_names():
            shards.add(name, packed.tensor(name))
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
