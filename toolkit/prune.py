"""Prune a model: the loop over decoder layers, and the run from recipe to packed folder."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm import data
from gblm.calibrate.gradients import gradient_norms
from gblm.calibrate.stats import STATS
from gblm.calibrate.walk import walk
from gblm.checkpoint.packed_folder import Packing, check_packable, check_room, write_packed
from gblm.checkpoint.reader import Reader
from gblm.errors import InputError, UsageError
from gblm.folder import resolve
from gblm.methods import Method, ScoredMethod, make_method
from gblm.model import check_device, load, load_tokenizer, prunable
from gblm.patterns import Pattern, parse
from gblm.progress import Progress, no_progress
from gblm.recipe import Recipe
from gblm.weights import SparseWeight

logger = logging.getLogger(__name__)


@torch.no_grad()
def prune_model(
    model: nn.Module,
    batches: Sequence[Tensor],
    method: Method,
    pattern: Pattern,
    linears: Mapping[str, nn.Linear],
    gradients: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, SparseWeight]]:
    """Prune in place, one decoder layer after another, and yield every pruned weight.

    Args:
        model: a causal language model in eval mode; its weights become the pruned ones.
        batches: calibration token ids, each [samples, tokens].
        method: how weights are judged.
        pattern: which positions may stay.
        linears: what to prune, by full name.
        gradients: "grad_norm" [out, in] by full name, for methods that need it.

    Yields:
        Full name and pruned weight, in the model's dtype.

    Raises:
        InputError: a weight is not finite.
    """
    for layer in walk(model, batches, method.needs & STATS.keys()):
        for local, linear in layer.linears.items():
            name = f"{layer.name}.{local}"
            if name not in linears:
                continue
            if local not in layer.stats:
                raise InputError(
                    f"{name} was never used on the calibration text; leave it dense: --ignore."
                )
            if not bool(linear.weight.isfinite().all()):
                raise InputError(f"{name}.weight holds NaN or Inf: the checkpoint is damaged.")
            stats = layer.stats[local] | ({"grad_norm": gradients[name]} if gradients else {})
            pruned = method.prune(linear.weight, stats, pattern)
            linear.weight.copy_(pruned.weight)
            yield name, pruned


def prune(
    recipe: Recipe,
    output: str | Path,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Prune a model and write it as a packed folder.

    Everything that can be refused is refused before the first forward pass.

    Args:
        recipe: all inputs of the run.
        output: the folder to make; it appears complete or not at all.
        overwrite: replace an existing folder.
        progress: for progress bars.

    Returns:
        The sparsity report of the folder, with "output" and "seconds" added.

    Raises:
        GblmError: see the error classes; nothing is left under `output`.
    """
    began = time.monotonic()
    check_device(recipe.device)
    method = make_method(recipe.method, recipe.options)
    pattern = parse(recipe.pattern)
    source, target = resolve(recipe.model), Path(output)
    with Reader(source) as reader:
        check_room(reader, target, overwrite)
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    model = load(source, dtype, recipe.device)
    linears = prunable(model, recipe.targets, recipe.ignore)
    with Reader(source) as reader:
        check_packable(reader, linears, pattern)
    if not method.needs:
        recipe = recipe.model_copy(update={"calibration": None})
    windows = _calibration_windows(recipe, source) if method.needs else None
    packing = Packing(
        source=source,
        pattern=pattern,
        linears=tuple(prunable(model)),
        recipe=recipe.to_dict(),
        notes={"calibration_sha256": data.fingerprint(windows) if windows is not None else None},
        keeps_values=isinstance(method, ScoredMethod),
    )
    pruned = _run(model, windows, method, pattern, linears, recipe, progress)
    report = write_packed(packing, pruned, target, overwrite)
    logger.info(
        "wrote %s: %.1f MB packed, %.1f MB dense",
        target,
        report["bytes_packed"] / 1e6,
        report["bytes_dense"] / 1e6,
    )
    return report | {"output": str(target), "seconds": round(time.monotonic() - began, 1)}


def _run(
    model: nn.Module,
    windows: Tensor | None,
    method: Method,
    pattern: Pattern,
    linears: Mapping[str, nn.Linear],
    recipe: Recipe,
    progress: Progress,
) -> Iterator[tuple[str, SparseWeight]]:
    """Gradients when the method needs them, then the loop, each with its progress bar."""
    batches: list[Tensor] = []
    if windows is not None and recipe.calibration is not None:
        batches = list(windows.split(recipe.calibration.batch_size))
    gradients = None
    if windows is not None and "grad_norm" in method.needs:
        norm = getattr(method, "gradient_norm", "l2")
        step = progress("gradients", len(windows))
        gradients = gradient_norms(model, list(windows), linears, norm, step)
    step = progress("pruning", len(linears))
    for item in prune_model(model, batches, method, pattern, linears, gradients):
        yield item
        step()


def _calibration_windows(recipe: Recipe, source: Path) -> Tensor:
    wanted = recipe.calibration
    if wanted is None:
        raise UsageError(f"method {recipe.method} needs calibration text; the recipe has none.")
    documents = data.read_documents(wanted.source, "calibration")
    return data.calibration_windows(
        documents, load_tokenizer(source), wanted.num_samples, wanted.seq_len, wanted.seed
    )
