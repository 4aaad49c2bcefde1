"""Dry run: what a pruning run will write, and the memory and time that it will take.

Everything is checked as for the run itself. Then one decoder layer is pruned for real on a part of
the text; memory and time follow from what that took. Nothing is written but scratch files.
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm.calibrate.activations import fits, stream_bytes
from gblm.calibrate.gradients import all_fit, itemsize
from gblm.calibrate.walk import DecoderLayer
from gblm.checkpoint.pack import Packing
from gblm.checkpoint.write import SHARD_BYTES
from gblm.errors import UsageError
from gblm.model.linears import hidden_size, linears
from gblm.progress import Progress, no_progress
from gblm.prune.job import Job, open_job
from gblm.prune.layer import LayerStats, prune_layer
from gblm.prune.run import Output, extent, extra_bytes
from gblm.recipe import Recipe, Recovering
from gblm.recover.needs import settle
from gblm.recover.run import check_texts
from gblm.sparse.formats import Format
from gblm.sparse.formats.size import is_exact

# Text that the timed decoder layer sees at most, unless one batch has more.
TOKENS = 8192
# What the allocator keeps, and what later layers add, on top of everything that was counted.
MARGIN, SLACK = 1.15, 64 << 20
# Float32 values that one token needs in a decoder layer, of the hidden and of the widest size: on
# the way up, and kept for the way down.
FORWARD, KEPT = (8, 4), (12, 6)
# Passes up that gradients take: one, and one down, which costs two; and one again layer by layer.
PASSES_AT_ONCE, PASSES_BY_LAYER = 3, 4


def dry_run(recipe: Recipe, output: Output, progress: Progress = no_progress) -> dict[str, Any]:
    """Check a pruning run and tell what it will take.

    Args:
        recipe: all inputs of the run.
        output: where it would write.
        progress: for progress bars.

    Returns:
        Plain JSON types. "groups": the linears by pattern and values, with their bits per weight.
        "bytes_packed": of all tensors of the packed folder, or at most so many if "exact" is False.
        "disk_bytes", "memory_bytes" and "gpu_bytes": upper bounds while it runs. "seconds": an
        estimate from one decoder layer on this machine. "recover": the tokens, memory and disk of
        a recovery, or None.

    Raises:
        UsageError: several processes were started.
        GblmError: whatever `prune` would refuse before it computes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("a dry run takes one process: start it without torchrun.")
    began = time.perf_counter()
    with open_job(recipe) as job, tempfile.TemporaryDirectory(prefix="gblm-dry-run-") as scratch:
        output.check(job)
        step = progress("one decoder layer", 1)
        job.batches()  # reads the text
        seconds = time.perf_counter() - began + _seconds(job, Path(scratch))
        step()
        reader = job.layers.reader
        packed = {name: job.most_bytes(name) for name in job.formats}
        pruned = sum(reader.num_bytes(f"{name}.weight") for name in packed)
        dense = sum(map(reader.num_bytes, reader))
        size = dense - pruned + sum(packed.values()) + (job.head.added_bytes if job.head else 0)
        memory, gpu = _memory_bytes(job, size)
        scope = job.pipeline.method.scope
        return {
            "method": recipe.method,
            "groups": _groups(job, packed),
            "head": str(job.head.fmt.values) if job.head else "float",
            "bits_per_weight": round(8 * sum(packed.values()) / _weights(job, packed), 4),
            "bytes_dense": dense,
            "bytes_packed": size,
            "exact": all(is_exact(fmt, scope) for fmt in job.formats.values()),
            "disk_bytes": size + extra_bytes(job),
            "memory_bytes": memory,
            "gpu_bytes": gpu,
            "seconds": round(seconds, 3),
            "recover": _recovery(job, recipe.recover) if recipe.recover is not None else None,
        }


def _recovery(job: Job, how: Recovering) -> dict[str, int]:
    """Tell what a recovery will take."""
    check_texts(how)
    size = extent(job)
    how = settle(how, size, str(job.layers.device))
    return {
        "tokens": how.tokens,
        "memory_bytes": size.memory(how),
        "disk_bytes": size.disk(how),
    }


def _weights(job: Job, names: Iterable[str]) -> int:
    """Count the weights of some linears."""
    headers = job.layers.reader.headers
    return sum(prod(headers[f"{name}.weight"][0]) for name in names)


def _groups(job: Job, packed: Mapping[str, int]) -> list[dict[str, Any]]:
    """Sum up the linears that will be stored alike."""
    names: dict[Format, list[str]] = {}
    for name, fmt in job.formats.items():
        names.setdefault(fmt, []).append(name)
    rows = []
    for fmt, own in names.items():
        weights = _weights(job, own)
        rows.append({
            "format": fmt.name,
            "pattern": str(fmt.pattern),
            "values": str(fmt.values),
            "linears": len(own),
            "weights": weights,
            "bits_per_weight": round(8 * sum(packed[name] for name in own) / weights, 4),
        })  # fmt: skip
    return rows


@torch.no_grad()
def _seconds(job: Job, scratch: Path) -> float:
    """Prune the heaviest decoder layer on a part of the text; estimate all layers on all text."""
    prefixes = [f"{job.layers.name(index)}." for index in range(len(job.layers))]
    names = [[n for n in job.formats if n.startswith(prefix)] for prefix in prefixes]
    heaviest = max(range(len(names)), key=lambda index: _weights(job, names[index]))
    part, every = _part(job), sum(batch.numel() for batch in job.batches())
    share = sum(batch.numel() for batch in part) / every if every else 1.0
    opening = _timed(job, lambda: _open(job, heaviest))
    walking = job.walk(scratch, part)  # the layer is open as long as the walk is
    layer = next(layer for layer in walking if layer.index == heaviest)
    layer.run(keep=False)  # the first pass sets up what later ones find ready
    running = _timed(job, lambda: layer.run(keep=False)) / share
    observing = _timed(job, lambda: layer.visit(lambda local, stats: None))
    # Pruning observes the same text once more.
    own = max(_timed(job, lambda: _prune(job, layer)) - observing, 0.0)
    text, trains = job.recipe.calibration, job.recipe.reconstruct is not None
    passes = observing / share + running * ((text is not None and text.order == "layer") + trains)
    seconds = len(job.layers) * (opening + passes)
    seconds += sum(map(bool, names)) * own / (share if trains else 1.0)
    if "grad_norm" in job.pipeline.needs:
        # The head counts like a decoder layer of its size.
        inside = sum(p.numel() for p in job.layers.modules.parameters())
        size = sum(p.numel() for p in job.layers.model.parameters()) / inside
        times = PASSES_AT_ONCE if _takes_gradients_at_once(job) else PASSES_BY_LAYER
        seconds += times * size * len(job.layers) * running
    return seconds


def _open(job: Job, index: int) -> None:
    with job.layers.open(index):
        pass


def _part(job: Job) -> list[Tensor]:
    """Take the first batches of the text, or some samples where all of them are one batch."""
    batches = job.batches()
    if job.recipe.calibration is not None and job.recipe.calibration.order == "sequential":
        return [batch[: max(1, TOKENS // batch.shape[1])] for batch in batches]
    return batches[: max(1, TOKENS // batches[0].numel())] if batches else []


def _prune(job: Job, layer: DecoderLayer) -> None:
    packing = Packing(job.layers, job.recipe.to_dict(), {}, job.keeps_values, job.head)
    ones: LayerStats = {}
    if "grad_norm" in job.pipeline.needs:
        # They stand in for gradient norms, which have not been taken.
        ones = {
            local: {"grad_norm": torch.ones(linear.weight.shape), "num_samples": torch.tensor(1.0)}
            for local, linear in layer.linears.items()
        }
    for name, weight in prune_layer(job, layer, lambda index: ones).weights.items():
        packing.pack(name, weight, job.formats[name])


def _timed(job: Job, work: Callable[[], Any]) -> float:
    """Give the seconds that some work takes, on a GPU until it has finished."""
    on_gpu = job.layers.device.type == "cuda"
    began = time.perf_counter()
    work()
    if on_gpu:
        torch.cuda.synchronize(job.layers.device)
    return time.perf_counter() - began


def _memory_bytes(job: Job, output: int) -> tuple[int, int]:
    """Bound the peak of host memory, and of the GPU's: what one layer took, and what it did not.

    Later come: all of the text at once, all decoder layers where gradients are taken with them in
    memory, and the shard that is being written.
    """
    device, layers, text = job.layers.device, job.layers, job.recipe.calibration
    cpu, inputs = torch.device("cpu"), stream_bytes(layers, job.batches())
    streams = inputs * (1 if job.recipe.reconstruct is None else 2)
    here = streams if fits(streams, cpu) else 0
    there = 0
    if text is not None and text.order == "sequential":
        there = _pass_bytes(job, sum(batch.numel() for batch in job.batches()), FORWARD)
    if text is not None and "grad_norm" in job.pipeline.needs:
        at_once = _takes_gradients_at_once(job)
        there = max(there, _gradient_bytes(job, text.seq_len, len(layers) if at_once else 1))
        stored = 0 if at_once else (len(layers) + 2) * inputs
        here = max(here, stored if fits(stored, cpu) else 0)
    shard = min(output, SHARD_BYTES) + (job.head.num_bytes if job.head else 0)
    if device.type == "cuda":
        gpu = int(MARGIN * (torch.cuda.max_memory_reserved(device) + there)) + SLACK
        return int(MARGIN * (_peak() + max(here, shard))) + SLACK, gpu
    return int(MARGIN * (_peak() + max(here + there, shard))) + SLACK, 0


def _takes_gradients_at_once(job: Job) -> bool:
    return all_fit(job.layers, job.formats, job.pipeline.gradient_norm)


def _gradient_bytes(job: Job, tokens: int, num_layers: int) -> int:
    """Count what gradients hold with so many layers in memory: weights, sums, states, the head."""
    model, modules, size = job.layers.model, job.layers.modules, itemsize(job.layers)
    inside = sum(p.numel() for p in modules.parameters())
    outside = int(sum(p.numel() for p in model.parameters())) - inside
    of_layers = inside * size + 4 * _weights(job, job.formats)
    # Logits, their softmax and its gradient.
    logits = 12 * tokens * int(model.config.get_text_config().vocab_size)
    kept = num_layers * _pass_bytes(job, tokens, KEPT)
    return of_layers * num_layers // len(modules) + outside * size + logits + kept


def _pass_bytes(job: Job, tokens: int, values: tuple[int, int]) -> int:
    """Count what so many tokens hold in one decoder layer."""
    wide = max(max(linear.weight.shape) for linear in linears(job.layers.modules[0]).values())
    return 4 * tokens * (values[0] * hidden_size(job.layers.model) + values[1] * wide)


def _peak() -> int:
    """Give the most memory that this process has had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
