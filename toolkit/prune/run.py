"""One pruning run: from a recipe to a packed folder; restartable, on one process or many."""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm.calibrate.ranks import Ranks, rank_device, ranks_from_environment
from gblm.calibrate.text import check_sources, parse_mix
from gblm.calibrate.walk import DecoderLayer
from gblm.checkpoint.head import Head
from gblm.checkpoint.pack import Packing, check_room, write_packed
from gblm.checkpoint.resume import (
    GRADIENTS,
    WorkFolder,
    only_one,
    open_work,
    remove_leftovers,
    work_path,
)
from gblm.checkpoint.write import check_output, folder_bytes
from gblm.files import read_json
from gblm.model.loading import check_device, fast_dtype, load_tokenizer
from gblm.model.packed_reader import MANIFEST_FILE, RECIPE_FILE, REPORT_FILE
from gblm.progress import Progress, no_progress
from gblm.provenance import computing_versions
from gblm.prune.gradients import read_gradients, take_gradients
from gblm.prune.job import Job, open_job
from gblm.prune.layer import Pruned, prune_layer, round_head
from gblm.recipe import Recipe, Recovering, published
from gblm.recover.needs import Extent, settle
from gblm.recover.run import recover
from gblm.recover.texts import read_texts
from gblm.sparse.formats import Format

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Output:
    """Where a run writes, and what it does with what is there.

    Attributes:
        folder: the packed folder to make; it appears complete or not at all.
        overwrite: replace an existing folder.
        resume: go on after the finished layers of an earlier run of the same recipe.
    """

    folder: Path
    overwrite: bool = False
    resume: bool = True

    def check(self, job: Job) -> None:
        """Refuse what is in the way, and a disk that cannot hold finished layers and the folder.

        Raises:
            GblmError: the output is not free, the disk has no room, or the head cannot be packed.
        """
        remove_leftovers(self.folder)
        if job.head is not None:
            job.head.check(job.layers.reader)
        extra = extra_bytes(job) - folder_bytes(work_path(self.folder))
        check_room(job.layers.reader, self.folder, self.overwrite, extra)


def extra_bytes(job: Job) -> int:
    """Bound the bytes that lie on disk at the end of a run besides the folder itself."""
    reader = job.layers.reader
    layers = int(1.1 * sum(reader.num_bytes(f"{name}.weight") for name in job.formats))
    # Updated values are kept unrounded as well; codes are exact.
    floats = (name for name, fmt in job.formats.items() if fmt.values.is_float)
    exact = 0 if job.keeps_values else 4 * _weights(job, floats)
    gradients = 4 * _weights(job, job.formats) if job.reads_gradients else 0
    return layers + exact + gradients + (job.head.num_bytes if job.head else 0)


def extent(job: Job) -> Extent:
    """Tell how large the pruned model will be."""
    reader = job.layers.reader
    shapes = {name: reader.headers[f"{name}.weight"][0] for name in job.formats}
    kept = sum(
        math.prod(shape) * (1 - job.formats[name].pattern.sparsity)
        for name, shape in shapes.items()
    )
    weights = sum(math.prod(shape) for shape, _ in reader.headers.values())
    config = job.layers.model.config.get_text_config()
    dtype = fast_dtype(job.layers.dtype, job.layers.device)
    return Extent(config, list(shapes.values()), math.ceil(kept), weights, dtype)


def dry_run(recipe: Recipe, output: Output) -> dict[str, Any]:
    """Check a pruning run and tell what it will write; nothing is pruned.

    Returns:
        Plain JSON types. "groups": the linears by pattern and values, with their bits per weight.
        "bytes_packed": of all tensors of the packed folder, or at most so many if "exact" is False.
        "disk_bytes": an upper bound while it runs, without the recovery's.

    Raises:
        GblmError: whatever `prune` would refuse before it computes, but for text that is too short.
    """
    with open_job(recipe) as job:
        output.check(job)
        if job.recipe.calibration is not None:
            check_sources(parse_mix(job.recipe.calibration.source))
        if recipe.recover is not None:
            _check_recovery(job, recipe.recover, output)
        reader, packed = job.layers.reader, {name: job.most_bytes(name) for name in job.formats}
        dense = sum(map(reader.num_bytes, reader))
        pruned = sum(reader.num_bytes(f"{name}.weight") for name in packed)
        size = dense - pruned + sum(packed.values()) + (job.head.added_bytes if job.head else 0)
        scope = job.pipeline.method.scope
        return {
            "groups": _groups(job),
            "head": str(job.head.fmt.values) if job.head else "float",
            "bits_per_weight": _bits(job, job.formats),
            "bytes_dense": dense,
            "bytes_packed": size,
            "exact": all(fmt.is_exact(scope) for fmt in job.formats.values()),
            "disk_bytes": size + extra_bytes(job),
        }


def _groups(job: Job) -> list[dict[str, Any]]:
    """Sum up the linears that will be stored alike."""
    names: dict[Format, list[str]] = {}
    for name, fmt in job.formats.items():
        names.setdefault(fmt, []).append(name)
    return [
        {
            "pattern": str(fmt.pattern),
            "values": str(fmt.values),
            "linears": len(own),
            "weights": _weights(job, own),
            "bits_per_weight": _bits(job, own),
        }
        for fmt, own in names.items()
    ]


def _weights(job: Job, names: Iterable[str]) -> int:
    headers = job.layers.reader.headers
    return sum(math.prod(headers[f"{name}.weight"][0]) for name in names)


def _bits(job: Job, names: Iterable[str]) -> float:
    """Give the bits that a weight of some linears takes when it is packed."""
    own = list(names)
    return round(8 * sum(map(job.most_bytes, own)) / _weights(job, own), 4)


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
    began, device = time.monotonic(), rank_device(recipe.device)
    target = output if isinstance(output, Output) else Output(Path(output))
    check_device(device)
    with ranks_from_environment(device) as ranks:
        if recipe.recover is None:
            with open_job(recipe, ranks) as job:
                report = _Run.of(job, target).execute(progress)
        else:
            with only_one(target.folder) if ranks.leads else nullcontext():
                report = _prune_and_recover(recipe, recipe.recover, target, progress, ranks)
    if not ranks.leads:
        return {}
    logger.info(
        "wrote %s: %.1f MB packed, %.1f MB dense",
        target.folder,
        report["bytes_packed"] / 1e6,
        report["bytes_dense"] / 1e6,
    )
    return report | {"output": str(target.folder), "seconds": round(time.monotonic() - began, 1)}


def _prune_and_recover(
    recipe: Recipe, how: Recovering, target: Output, progress: Progress, ranks: Ranks
) -> dict[str, Any]:
    """Prune into a folder beside the output and recover from it; returns rank 0's report."""
    with open_job(recipe, ranks) as job:
        pruned = _prune_beside(job, how, target, progress)
    recover(
        pruned, target.folder, how, recipe.model, device=rank_device(recipe.device),
        overwrite=target.overwrite, resume=target.resume, progress=progress, ranks=ranks,
    )  # fmt: skip
    if not ranks.leads:
        return {}
    shutil.rmtree(pruned)
    return read_json(target.folder / REPORT_FILE)


def _prune_beside(job: Job, how: Recovering, target: Output, progress: Progress) -> Path:
    """Prune into a folder beside the output, unless an earlier run has; returns the folder."""
    folder = target.folder.parent / f".{target.folder.name}.pruned"
    _check_recovery(job, how, target)
    if job.ranks.leads and how.minutes is None:
        # The model's own text is one stream: written so far, it holds what calibration takes, too.
        text, tokenizer = job.recipe.calibration, load_tokenizer(job.folder)
        read_texts(how, text, job.folder.path, tokenizer, how.tokens)
    done = job.ranks.leads and target.resume and _is_pruned(folder, job)
    if not job.ranks.agree(int(done)):
        _Run.of(job, replace(target, folder=folder, overwrite=True)).execute(progress)
    return folder


def _check_recovery(job: Job, how: Recovering, target: Output) -> None:
    """Refuse a recovery, before anything is pruned, whose text, memory or disk is not there."""
    size = extent(job)
    check_sources((*parse_mix(how.text), *how.held_out))
    how = settle(how, size, str(job.layers.device))
    need = size.disk(how) - folder_bytes(work_path(target.folder))
    check_output(target.folder, target.overwrite, need, job.folder.path)


def _is_pruned(folder: Path, job: Job) -> bool:
    """Tell whether an earlier run of the same recipe, on the same model and text, ended here."""
    if not (folder / RECIPE_FILE).exists():
        return False
    notes = read_json(folder / MANIFEST_FILE)
    recipe = read_json(folder / RECIPE_FILE) | {"model": ""}
    found = (recipe, notes.get("model_sha256"), notes.get("calibration_sha256"))
    now = published(job.recipe.to_dict() | {"model": ""})
    return found == (now, job.model_sha256, job.calibration_sha256)


@dataclass(frozen=True)
class _Run:
    """A checked job, where it writes, and how it is packed."""

    job: Job
    output: Output
    packing: Packing

    @classmethod
    def of(cls, job: Job, output: Output) -> _Run:
        """Check the output, then read the text and the model's files, which name the run."""
        if job.ranks.leads:
            output.check(job)
        notes = {"calibration_sha256": job.calibration_sha256, "model_sha256": job.model_sha256}
        packing = Packing(job.layers, job.recipe.to_dict(), notes, job.keeps_values, job.head)
        return cls(job, output, packing)

    def execute(self, progress: Progress) -> dict[str, Any]:
        """Take gradients if the method needs them, prune the decoder layers, write the folder."""
        job = self.job
        with self._work() as work, self._scratch() as scratch:
            first = job.ranks.agree(len(work.finished) if work else 0)
            head = job.head
            if first < len(job.layers) or job.rounds_head:
                folder = work_path(self.output.folder) / GRADIENTS
                take_gradients(job, folder, scratch, progress)
                gradients = partial(read_gradients, job, folder)
                step = progress("pruning", len(job.layers) - first)
                for layer in job.walk(scratch):
                    if layer.index < first:
                        self._restore(layer, work)
                    else:
                        # No variable: it would hold this layer until the next one is pruned.
                        self._keep(prune_layer(job, layer, gradients), work)
                        step()
                    if job.rounds_head and layer.index + 1 == len(job.layers):
                        head = round_head(job, layer)
            return self._publish(work, head) if work is not None else {}

    def _keep(self, pruned: Pruned, work: WorkFolder | None) -> None:
        """Make a pruned decoder layer durable, on rank 0."""
        if work is None:
            return
        reader = self.job.layers.reader
        tensors = {n: t.to(reader.headers[n][1]) for n, t in pruned.others.items()}
        rows: list[dict[str, Any]] = []
        for name, weight in pruned.weights.items():
            parts, own_rows = self.packing.pack(name, weight, self.job.formats[name])
            tensors |= parts
            rows += own_rows
        work.add(tensors, rows, self._exact_values(pruned))
        reader.release()

    def _exact_values(self, pruned: Pruned) -> dict[str, Tensor]:
        """Return what a resumed run needs besides the packed parts, to go on with the same bits."""
        headers = self.job.layers.reader.headers

        def narrowed(name: str, tensor: Tensor) -> bool:
            return tensor.dtype != headers[name][1]

        others = {name: t for name, t in pruned.others.items() if narrowed(name, t)}
        if self.job.keeps_values:
            return others
        return others | {
            f"{name}.values": self.job.formats[name].pack(name, weight)["values"]
            for name, weight in pruned.weights.items()
            if weight.codes is None and narrowed(f"{name}.weight", weight.weight)
        }

    @torch.no_grad()
    def _restore(self, layer: DecoderLayer, work: WorkFolder | None) -> None:
        """Give every rank's layer the weights that an earlier run found for it."""
        if work is not None:
            finished = work.finished[layer.index]
            tensors = finished.packed() | finished.exact_values()
            for local, linear in layer.linears.items():
                name = f"{layer.name}.{local}"
                if f"{name}.values" in tensors:
                    fmt = self.job.formats[name]
                    parts = {part: tensors[f"{name}.{part}"] for part in fmt.parts}
                    linear.weight.copy_(fmt.expand(parts, linear.weight.dtype))
            for local, parameter in layer.module.named_parameters():
                if (trained := tensors.get(f"{layer.name}.{local}")) is not None:
                    parameter.copy_(trained)
        # Norms and biases, too: they may have been trained.
        for parameter in layer.module.parameters():
            self.job.ranks.broadcast_(parameter.data)

    def _publish(self, work: WorkFolder, head: Head | None) -> dict[str, Any]:
        target, packing = self.output, replace(self.packing, head=head)
        work.mark_complete(target.folder)
        pieces = ((layer.packed(), layer.rows) for layer in work.finished)
        return write_packed(packing, pieces, target.folder, target.overwrite, work.path)

    @contextmanager
    def _work(self) -> Iterator[WorkFolder | None]:
        """Open the work folder, on rank 0."""
        if not self.job.ranks.leads:
            yield None
            return
        fingerprint = {
            **{f"recipe.{key}": value for key, value in self.packing.recipe.items()},
            **self.packing.notes,
            "ranks": self.job.ranks.size,
            "dtype": str(self.job.layers.dtype),
            "versions": computing_versions(),
        }
        with open_work(self.output.folder, fingerprint, self.output.resume) as work:
            yield work

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """Name this rank's own folder for activations, and remove what came to lie in it."""
        folder = work_path(self.output.folder) / f"scratch-{self.job.ranks.rank}"
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
