"""One pruning run: from a recipe to a packed folder; restartable, on one process or many."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm import __version__
from gblm.calibrate.saved import StatsFolder
from gblm.calibrate.walk import DecoderLayer
from gblm.checkpoint.packer import Packing, check_packable, write_packed
from gblm.checkpoint.reader import Reader
from gblm.checkpoint.work import WorkFolder, open_work, work_path
from gblm.checkpoint.writer import folder_sha256
from gblm.choices import choose
from gblm.folder import resolve
from gblm.layers import StreamedLayers
from gblm.loop import Loop, Pruned, prune_layers
from gblm.model import check_device, head_dim, output_head, prunable, refuse_packed
from gblm.output import Output
from gblm.progress import Progress, no_progress
from gblm.provenance import versions
from gblm.ranks import Ranks, rank_device, ranks_from_environment
from gblm.recipe import Recipe
from gblm.statistics import Statistics
from gblm.steps import Steps, steps_of

__all__ = ["Output", "prune"]

logger = logging.getLogger(__name__)


def prune(
    recipe: Recipe, output: Output | str | Path, progress: Progress = no_progress
) -> dict[str, Any]:
    """Prune a model and write it as a packed folder.

    Everything that can be refused is refused before the first forward pass. Under torchrun all
    ranks call this; rank 0 writes.

    Args:
        recipe: all inputs of the run.
        output: the folder to make, or more about it.
        progress: for progress bars.

    Returns:
        The sparsity report of the folder, with "output" and "seconds" added; empty on other ranks.

    Raises:
        GblmError: see the error classes; nothing is left under the output's name.
    """
    began = time.monotonic()
    target = output if isinstance(output, Output) else Output(Path(output))
    device = rank_device(recipe.device)
    check_device(device)
    with ranks_from_environment(device) as ranks, Reader(resolve(recipe.model)) as reader:
        report = _prepare(recipe, target, reader, device, ranks).execute(progress)
    if not ranks.leads:
        return {}
    logger.info(
        "wrote %s: %.1f MB packed, %.1f MB dense",
        target.folder,
        report["bytes_packed"] / 1e6,
        report["bytes_dense"] / 1e6,
    )
    return report | {"output": str(target.folder), "seconds": round(time.monotonic() - began, 1)}


def _prepare(recipe: Recipe, output: Output, reader: Reader, device: str, ranks: Ranks) -> _Run:
    """Check everything that can be checked without computing."""
    steps = steps_of(recipe)
    refuse_packed(reader.folder)
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    layers = StreamedLayers(reader, dtype, device)
    choices = choose(recipe, prunable(layers.model, recipe.targets, recipe.ignore))
    steps.check(choices, ranks.size)
    check_packable(reader, choices)
    if ranks.leads:
        output.check(recipe, steps, layers, choices)
    recipe = recipe.model_copy(update={"calibration": steps.calibration})
    sha256 = folder_sha256(reader.folder, {"config.json", *reader.files})
    pipeline, names = steps.pipeline, frozenset(choices)
    statistics = Statistics.prepare(recipe, pipeline, layers, names, ranks, sha256)
    packing = Packing(
        source=reader.folder,
        choices=choices,
        linears=tuple(prunable(layers.model)),
        recipe=recipe.to_dict(),
        notes={"calibration_sha256": statistics.calibration_sha256, "model_sha256": sha256},
        keeps_values=steps.keeps_values,
        head_dim=head_dim(layers.model),
        head=output_head(layers.model, recipe.head, reader),
    )
    return _Run(packing, output, reader, layers, steps, statistics)


@dataclass(frozen=True)
class _Run:
    """A run whose inputs have been checked."""

    packing: Packing
    output: Output
    reader: Reader
    layers: StreamedLayers
    steps: Steps
    statistics: Statistics

    @property
    def ranks(self) -> Ranks:
        return self.statistics.ranks

    def execute(self, progress: Progress) -> dict[str, Any]:
        """Gradients when the method needs them, then the loop, then the folder."""
        with self._work() as work, self._scratch() as scratch:
            first = self.ranks.agree(len(work.finished) if work else 0)
            gradients = StatsFolder(work_path(self.output.folder) / "gradients")
            if first < len(self.layers):
                self._gradients(gradients, scratch, progress)
                step = progress("pruning", len(self.layers) - first)
                loop = self._loop(work, gradients, scratch, first)
                for pruned in prune_layers(self.layers, self.statistics.batches(), loop):
                    if work is not None:
                        tensors, rows = self.packing.pack(self.reader, pruned.weights)
                        dtypes = self.reader.headers
                        others = {n: t.to(dtypes[n][1]) for n, t in pruned.others.items()}
                        work.add({**tensors, **others}, rows, self._exact_values(pruned))
                        self.reader.release()
                    step()
            return self._publish(work) if work is not None else {}

    def _exact_values(self, pruned: Pruned) -> dict[str, Tensor]:
        """What a resumed run needs besides what is packed, to go on with the very same bits."""

        def narrowed(name: str, tensor: Tensor) -> bool:
            return tensor.dtype != self.reader.headers[name][1]

        others = {name: t for name, t in pruned.others.items() if narrowed(name, t)}
        if self.packing.keeps_values:
            return others
        return others | {
            f"{name}.values": self.packing.choices[name].fmt.pack(name, weight)["values"]
            for name, weight in pruned.weights.items()
            if weight.codes is None and narrowed(f"{name}.weight", weight.weight)
        }

    def _gradients(self, folder: StatsFolder, scratch: Path, progress: Progress) -> None:
        """Take gradient norms unless they are saved, or an earlier run has finished them."""
        if "grad_norm" not in self.steps.pipeline.needs or self.statistics.saved is not None:
            return
        if not self.ranks.agree(int(folder.complete)):
            self.statistics.make_gradients(folder, scratch, progress)

    def _loop(
        self, work: WorkFolder | None, gradients: StatsFolder, scratch: Path, first: int
    ) -> Loop:
        how = self.statistics.walk(scratch, first)
        steps = self.steps
        loop = Loop(steps.pipeline, self.packing.choices, how, training=steps.training)
        if work is None:
            return loop
        if self.output.save_stats is not None:
            loop = replace(loop, save=StatsFolder(work.path / "stats").write)
        restore = partial(_restore, work, self.packing)
        return replace(loop, restore=restore, more=self.statistics.stored(gradients))

    def _publish(self, work: WorkFolder) -> dict[str, Any]:
        target = self.output
        work.mark_complete(target.folder)
        stats = StatsFolder(work.path / "stats")
        # Gone already when an earlier run was cut off after it.
        if target.save_stats is not None and stats.path.exists():
            stats.finish(self.statistics.facts(self.steps.pipeline.needs))
            stats.publish(target.save_stats.resolve())
        pieces = ((layer.packed(), layer.rows) for layer in work.finished)
        return write_packed(self.packing, pieces, target.folder, target.overwrite, work.path)

    @contextmanager
    def _work(self) -> Iterator[WorkFolder | None]:
        """The work folder, on rank 0."""
        if not self.ranks.leads:
            yield None
            return
        fingerprint = {
            **{f"recipe.{key}": value for key, value in self.packing.recipe.items()},
            **self.packing.notes,
            "save_stats": self.output.save_stats is not None,
            "statistics": self.statistics.saved.facts() if self.statistics.saved else None,
            "ranks": self.ranks.size,
            "versions": {"gblm": __version__}
            | {key: versions()[key] for key in ("torch", "transformers")},
        }
        with open_work(self.output.folder, fingerprint, self.output.resume) as work:
            yield work

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """This rank's own folder for activations; made when it is written to."""
        folder = work_path(self.output.folder) / f"scratch-{self.ranks.rank}"
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _restore(work: WorkFolder, packing: Packing, layer: DecoderLayer) -> None:
    """Give a layer the weights that an earlier run found for it."""
    finished = work.finished[layer.index]
    tensors = finished.packed() | finished.exact_values()
    for local, linear in layer.linears.items():
        name = f"{layer.name}.{local}"
        if f"{name}.values" in tensors:
            fmt = packing.choices[name].fmt
            parts = {part: tensors[f"{name}.{part}"] for part in fmt.parts}
            linear.weight.copy_(fmt.expand(parts, linear.weight.dtype))
    for local, parameter in layer.module.named_parameters():
        if (trained := tensors.get(f"{layer.name}.{local}")) is not None:
            parameter.copy_(trained)
