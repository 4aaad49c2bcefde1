"""Remove whole experts: what is left is an ordinary folder with smaller routers.

A router that chooses among fewer experts computes what the whole one would if the scores of those
that are gone were −∞.
"""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm.calibrate.experts import Use, counted
from gblm.calibrate.text import draw
from gblm.calibrate.walk import Walk, walk
from gblm.checkpoint.write import ShardWriter, check_output, copy_side_files, new_folder
from gblm.errors import CheckpointError, InputError, UsageError
from gblm.files import write_json
from gblm.model.experts import blocks, cuts, routers
from gblm.model.folder import ModelFolder
from gblm.model.layers import Layers, stream
from gblm.model.loading import load_tokenizer, names_in_memory
from gblm.model.reader import Reader
from gblm.progress import Progress, no_progress
from gblm.recipe import SHARD_SIZE, Calibration, DType, shard_bytes

# What an expert is worth. REAP (arXiv 2510.13999) is the mean of w ‖f(x)‖ over the tokens
# that reach it, w the router's weight and f(x) the expert's output.
WORTH: dict[str, Callable[[Use], float]] = {
    "reap": lambda use: use.added / max(1, use.tokens),
    "frequency": lambda use: float(use.tokens),
}
# Names of experts kept, in order, by the full name of the module that holds them.
Kept = Mapping[str, list[int]]


def remove_experts(
    model: str | Path,
    output: Path,
    keep: int,
    by: str = "reap",
    text: Calibration | None = None,
    *,
    dtype: DType = "auto",
    device: str = "cpu",
    max_shard_size: str = SHARD_SIZE,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Keep the experts of each decoder layer that are worth most on a text; no weight changes.

    Args:
        model: a dense mixture of experts, as a local HF folder or a hub id.
        output: the folder to make.
        keep: how many experts each layer keeps.
        by: a name in WORTH.
        text: that tells what they are worth; one pass forward is made over it.
        dtype: of that pass.
        device: of that pass.
        max_shard_size: of a file of weights, as `gblm.recipe.shard_bytes` reads it.
        overwrite: replace an existing folder.
        progress: for a progress bar.

    Returns:
        Plain JSON types: "experts" and "keep", "layers" that hold experts, "share" of the text's
        tokens that went to those kept, counted once for each expert that they reached, the sizes,
        and "kept": their numbers by the name of the module that holds them.

    Raises:
        UsageError: a layer cannot keep so many.
        GblmError: the model is no mixture that gblm knows, or nothing can be written.
    """
    began, text, size = time.monotonic(), text or Calibration(), shard_bytes(max_shard_size)
    compute = None if dtype == "auto" else getattr(torch, dtype)
    with stream(ModelFolder.open(model), compute, device) as layers:
        folder, reader = layers.reader.folder, layers.reader
        count = check_count(layers, keep)
        config = _smaller(folder, count, keep)
        before = sum(map(reader.num_bytes, reader))
        check_output(output, overwrite, before, folder.path)
        uses = _uses(layers, text, progress)
        kept = {name: _best([WORTH[by](use) for use in own], keep) for name, own in uses.items()}
        with new_folder(output, overwrite) as work, Reader(folder) as stored:
            shards = ShardWriter(work, size)
            for name, tensor in _left(layers, stored, kept):
                shards.add(name, tensor)
            shards.finish()
            copy_side_files(folder.path, work)
            write_json(work / "config.json", config)
            _check(work, folder)
    tokens = {(name, e): use.tokens for name, own in uses.items() for e, use in enumerate(own)}
    return {
        "model": str(model),
        "output": str(output),
        "by": by,
        "experts": count,
        "keep": keep,
        "layers": len(kept),
        "share": sum(tokens[name, e] for name, own in kept.items() for e in own)
        / sum(tokens.values()),
        "bytes_before": before,
        "bytes_after": shards.total_bytes,
        "kept": kept,
        "seconds": round(time.monotonic() - began, 1),
    }


def check_count(layers: Layers, keep: int) -> int:
    """Return how many experts each layer has.

    Raises:
        UsageError: it cannot keep so many.
        InputError: there are none, or layers have different numbers of them.
    """
    folder, text = layers.reader.folder, layers.model.config.get_text_config()
    counts = {len(experts) for _, experts in blocks(layers.model)}
    if not counts:
        raise InputError(f"{folder}: the model has no experts to remove.")
    if len(counts) > 1:
        raise InputError(
            f"{folder}: decoder layers have {min(counts)} to {max(counts)} experts; gblm removes "
            "some only where all layers have equally many."
        )
    (count,), used = counts, getattr(text, "num_experts_per_tok", 1)
    if not used <= keep < count:
        raise UsageError(
            f"--keep {keep}: the layers of {folder} have {count} experts, and a token uses {used} "
            f"of them; keep {used} to {count - 1}."
        )
    if (getattr(text, "n_group", None) or 1) > 1:
        raise InputError(
            f"{folder}: routers choose among {text.n_group} groups of experts first, which must "
            "stay equally large; gblm removes no experts there."
        )
    return count


def _smaller(folder: ModelFolder, count: int, keep: int) -> dict[str, Any]:
    """Return config.json with another number of experts."""
    text = folder.text_config
    names = [
        name
        for name, value in text.items()
        if re.search(r"(^|_)experts$", name) and "shared" not in name and value == count
    ]
    if not names:
        raise InputError(
            f"{folder}: config.json does not say that there are {count} experts; add the number "
            "under the name that the family gives it, such as num_experts."
        )
    changed = text | dict.fromkeys(names, keep)
    return changed if text is folder.config else folder.config | {"text_config": changed}


@torch.no_grad()
def _uses(layers: Layers, text: Calibration, progress: Progress) -> dict[str, list[Use]]:
    """Run the text through the layers; returns each expert's use, by full name of their module."""
    folder, found = layers.reader.folder.path, dict[str, list[Use]]()
    windows = draw(text, folder, load_tokenizer(folder))
    step = progress("experts", len(layers))
    with tempfile.TemporaryDirectory(prefix="gblm-experts-") as scratch:
        way = Walk(needs=frozenset(), scratch=Path(scratch), runs=True)
        for layer in walk(layers, list(windows.split(1)), way):
            with counted(layer.module) as uses:
                layer.run()
            for name, use in uses.items():
                block = f"{layer.name}.{name.rpartition('.')[0]}"
                if not torch.tensor(use.added).isfinite():
                    raise InputError(
                        f"{block}: outputs of experts are not finite. Run with --dtype float32, "
                        "or check the model's weights."
                    )
                found.setdefault(block, []).append(use)
            step()
    return found


def _best(worth: list[float], keep: int) -> list[int]:
    """Choose the experts that are worth most, the first of equal ones; returns them in order."""
    return sorted(sorted(range(len(worth)), key=lambda expert: -worth[expert])[:keep])


def _left(layers: Layers, stored: Reader, kept: Kept) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of the smaller model one by one, called as the source's files call them."""
    names = names_in_memory(layers.model, stored)
    stored_name = {names.get(name, name): name for name in stored}
    # Tensors with a row for each expert, and where each expert's own tensors go.
    rows = _routing(layers, kept)
    moves: dict[str, str | None] = {}
    for name, cut in cuts(layers.model).items():
        block, number, role = _parts(name)
        rows[cut.whole] = kept[block]
        new = kept[block].index(number) if number in kept[block] else None
        moves[name] = None if new is None else f"{block}.{new}.{role}"
    for name, source in stored_name.items():
        target = moves.get(name, name)
        if target is not None:
            tensor = stored.tensor(source)
            yield stored_name[target], tensor[rows[name]] if name in rows else tensor
            stored.release()


def _routing(layers: Layers, kept: Kept) -> dict[str, list[int]]:
    """Find the routers' tensors with a row for each expert: weights, biases, corrections."""
    found, known = {}, routers(layers.model)
    for block, experts in blocks(layers.model):
        beside = block.rpartition(".")[0]
        for name, module in layers.model.get_submodule(beside).named_modules(prefix=beside):
            if module in known:
                own = (
                    *module.named_parameters(recurse=False),
                    *module.named_buffers(recurse=False),
                )
                for local, tensor in own:
                    if tensor.ndim and len(tensor) == len(experts):
                        found[f"{name}.{local}"] = kept[block]
    return found


def _parts(name: str) -> tuple[str, int, str]:
    """Split the name of an expert's weight: the module of all, its number, its own name."""
    block, number, linear, weight = name.rsplit(".", 3)
    return block, int(number), f"{linear}.{weight}"


def _check(work: Path, folder: ModelFolder) -> None:
    """Refuse a model of which further tensors would have had to shrink."""
    try:
        with Reader(ModelFolder.open(work)) as written:
            Layers(written)
    except CheckpointError as error:
        reason = str(error).removeprefix(f"{work}: ")
        raise InputError(
            f"{folder}: gblm cannot remove experts of this family: {reason}"
        ) from error
