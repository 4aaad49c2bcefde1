"""CPU seconds of pruning: gblm against the papers' algorithm written plainly, in turn.

    python benchmarks/pruning.py [--rounds 3] [--methods wanda gblm sparsegpt] [--pattern 2:4]

SmolLM2-135M, float32, 16 × 256 tokens, batch 1; every run is a fresh process with one thread. The
plain side has the structure and cost of the published code of Wanda, SparseGPT and GBLM-Pruner,
less its checks, files and printing; ours runs in both orders. Its "total" leaves "setup" out (model, tokenizer, text); ours
is the whole of prune(), and its "pruning" packs and writes the weights as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gblm import data
from gblm.checkpoint.packed_folder import PackedReader
from gblm.fetch import fetch
from gblm.patterns import NM, Pattern, parse
from gblm.provenance import provenance
from gblm.prune import prune
from gblm.recipe import Calibration, Recipe

RECORD = Path(__file__).resolve().parent / "results" / "pruning-speed.json"
METHODS, SIDES = ("wanda", "gblm", "sparsegpt"), ("plain", "ours", "sequential")
CALIBRATION = Calibration(source="pydoc", num_samples=16, seq_len=256, seed=0, batch_size=1)
# Ours is given options only where its defaults are not the published method.
OPTIONS: dict[str, dict[str, Any]] = {"gblm": {"gradient_mode": "reference"}}
SCALE, BLOCK, DAMP = 100, 128, 0.01  # of GBLM's gradients; of SparseGPT


def observe(value: Tensor) -> Callable[..., None]:
    """A hook: the mean over samples of Σ over tokens x² [in] (Wanda), or of 2·x·xᵀ [in, in]."""
    seen = 0

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal seen
        columns = inputs[0].reshape(-1, inputs[0].shape[-1]).t()
        value.mul_(seen / (seen + 1))
        seen += 1
        if value.dim() == 1:
            value.add_(torch.norm(columns.float(), p=2, dim=1) ** 2 / seen)
        else:
            columns = math.sqrt(2 / seen) * columns.float()
            value.add_(columns @ columns.t())

    return hook


def linears(module: nn.Module) -> dict[str, nn.Linear]:
    """By their names in the module."""
    return {name: part for name, part in module.named_modules() if isinstance(part, nn.Linear)}


def plain_gradients(model: Any, windows: Tensor) -> dict[str, Tensor]:
    """Backward through the whole model per sample; both norms are summed, l2 is handed on."""
    found = linears(model.model.layers)
    l1 = {name: torch.zeros_like(m.weight, dtype=torch.float16) for name, m in found.items()}
    l2 = {name: torch.zeros_like(m.weight, dtype=torch.float32) for name, m in found.items()}
    for ids in windows.split(1):
        model(input_ids=ids, labels=ids).loss.backward()
        for name, linear in found.items():
            gradient = linear.weight.grad.detach().clone().float()  # type: ignore[union-attr]
            l1[name] = l1[name] + torch.abs(gradient * SCALE).half()
            l2[name] = l2[name] + torch.abs((gradient * SCALE) ** 2)
        model.zero_grad()
    return {name: torch.sqrt(total).half() for name, total in l2.items()}


@torch.no_grad()
def plain_prune(
    model: Any, windows: Tensor, method: str, pattern: Pattern, gradients: dict[str, Tensor]
) -> None:
    """Per layer: all samples forward with hooks, prune the linears, all samples forward again."""
    hidden, kwargs = first_inputs(model, windows)
    outputs, dims = torch.zeros_like(hidden), 2 if method == "sparsegpt" else 1
    for index, layer in enumerate(model.model.layers):
        found = linears(layer)
        stats = {name: torch.zeros([m.in_features] * dims) for name, m in found.items()}
        handles = [m.register_forward_hook(observe(stats[name])) for name, m in found.items()]
        for sample, inputs in enumerate(hidden):
            outputs[sample] = layer(inputs.unsqueeze(0), **kwargs)
        for handle in handles:
            handle.remove()
        for name, linear in found.items():
            weight = linear.weight.data
            if method == "sparsegpt":
                linear.weight.data = update_columns(weight.clone(), stats[name], pattern)
                continue
            metric = torch.abs(weight) * torch.sqrt(stats[name].reshape(1, -1))
            if method == "gblm":
                metric = metric + torch.abs(weight) * torch.abs(gradients[f"{index}.{name}"])
            weight[lowest(metric, pattern)] = 0
        for sample, inputs in enumerate(hidden):
            outputs[sample] = layer(inputs.unsqueeze(0), **kwargs)
        hidden, outputs = outputs, hidden


def first_inputs(model: Any, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """What the first layer is called with; the other layers get the same keyword arguments."""
    hidden: list[Tensor] = []
    caught: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        caught.update(kwargs)
        raise InterruptedError

    handle = model.model.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
    for ids in windows.split(1):
        with contextlib.suppress(InterruptedError):
            model(input_ids=ids, use_cache=False)
    handle.remove()
    return torch.cat(hidden), caught


def lowest(metric: Tensor, pattern: Pattern) -> Tensor:
    """Mask of what goes: a topk per group of columns, or a stable sort of every row."""
    mask = torch.zeros_like(metric) == 1
    if isinstance(pattern, NM):
        for column in range(0, metric.shape[1], pattern.group_m):
            mark_group(mask, metric[:, column : column + pattern.group_m], column, pattern)
    else:
        order = torch.sort(metric, dim=-1, stable=True)[1]
        mask.scatter_(1, order[:, : int(metric.shape[1] * pattern.sparsity)], True)
    return mask


def mark_group(mask: Tensor, metric: Tensor, column: int, pattern: NM) -> None:
    """Mark the lowest of one group of columns, row by row."""
    num_pruned = pattern.group_m - pattern.keep_n
    chosen = torch.topk(metric.float(), num_pruned, dim=1, largest=False)[1]
    mask.scatter_(1, column + chosen, True)


def update_columns(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """SparseGPT: column by column, what a cut breaks is mended in the columns to its right."""
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian.diagonal().add_(DAMP * torch.mean(torch.diag(hessian)))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    upper = torch.linalg.cholesky(inverse, upper=True)
    for begin in range(0, weight.shape[1], BLOCK):
        block, rest = slice(begin, begin + BLOCK), slice(begin + BLOCK, None)
        work = weight[:, block].clone()
        weight[:, block], error = prune_block(work, upper[block, block], pattern)
        weight[:, rest] -= error @ upper[block, rest]
    return weight


def prune_block(work: Tensor, upper: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """One block of columns: the pruned weights, and the error to carry to the right of it."""
    pruned, error, loss = (torch.zeros_like(work) for _ in range(3))
    mask = torch.zeros_like(work) == 1
    diagonal = torch.diag(upper).reshape(1, -1)
    if not isinstance(pattern, NM):
        score = work**2 / diagonal**2
        mask = score <= torch.sort(score.flatten())[0][int(score.numel() * pattern.sparsity)]
    for column in range(work.shape[1]):
        if isinstance(pattern, NM) and column % pattern.group_m == 0:
            group = slice(column, column + pattern.group_m)
            mark_group(mask, work[:, group] ** 2 / diagonal[:, group] ** 2, column, pattern)
        old, pivot = work[:, column], upper[column, column]
        new = old.clone()
        new[mask[:, column]] = 0
        pruned[:, column] = new
        loss[:, column] = (old - new) ** 2 / pivot**2
        wrong = (old - new) / pivot
        work[:, column:] -= wrong.unsqueeze(1) @ upper[column, column:].unsqueeze(0)
        error[:, column] = wrong
    return pruned, error


def cpu_seconds() -> float:
    """User and system time of this process and its children."""
    return sum(os.times()[:4])


def run_plain(method: str, pattern: str, seconds: dict[str, float]) -> Any:
    """The pruned model; seconds by phase are added."""
    times = [cpu_seconds()]
    folder, want = fetch("smollm2"), CALIBRATION
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = data.read_documents(want.source, "calibration")
    windows = data.calibration_windows(text, tokenizer, want.num_samples, want.seq_len, want.seed)
    times.append(cpu_seconds())
    gradients = plain_gradients(model, windows) if method == "gblm" else {}
    times.append(cpu_seconds())
    plain_prune(model, windows, method, parse(pattern), gradients)
    times.append(cpu_seconds())
    seconds["setup"], seconds["pruning"] = times[1] - times[0], times[3] - times[2]
    seconds["gradients"] = times[2] - times[1]
    return model


def run_ours(
    method: str, pattern: str, seconds: dict[str, float], output: Path, order: str
) -> None:
    """The whole of prune(); a phase lasts from its announcement to its last step."""
    recipe = Recipe(model=str(fetch("smollm2")), method=method, pattern=pattern, dtype="float32",
                    options=OPTIONS.get(method, {}),
                    calibration=CALIBRATION.model_copy(update={"order": order}))  # fmt: skip

    def progress(phase: str, steps: int) -> Callable[[], None]:
        began = cpu_seconds() - seconds.get(phase, 0.0)
        return lambda: seconds.update({phase: cpu_seconds() - began})

    began = cpu_seconds()
    prune(recipe, output, progress=progress)
    seconds["total"] = cpu_seconds() - began


def measure(side: str, method: str, pattern: str) -> dict[str, float]:
    """One run in this process; "check" runs both sides and compares their masks."""
    seconds: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "out"
        if side != "plain":
            order = "sequential" if side == "sequential" else "layer"
            run_ours(method, pattern, seconds, output, order)
        if side in ("plain", "check"):
            model = run_plain(method, pattern, seconds)
        if side == "check":
            return different_bits(model, output)
    # Not ru_maxrss: a child's starts at what its parent had when it forked.
    peak = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    both = seconds.get("gradients", 0.0) + seconds["pruning"]
    return {"gradients + pruning": both, "total": both, **seconds, "peak_rss_kib": int(peak[0])}


def different_bits(model: Any, output: Path) -> dict[str, float]:
    """Share of mask bits in which a packed folder differs from a pruned model."""
    layers: dict[str, list[Tensor]] = {}
    with PackedReader(output) as packed:
        for name, linear in linears(model.model.layers).items():
            ours = packed.linears[f"model.layers.{name}"]
            kept = ours.fmt.expand(packed.parts(ours.name)) != 0
            layers.setdefault(name.split(".")[0], []).append((kept != (linear.weight != 0)).ravel())
    shares = [float(torch.cat(bits).float().mean()) for bits in layers.values()]
    return {"different_bits": statistics.mean(shares), "different_bits_layer_0": shares[0]}


def child(side: str, method: str, pattern: str) -> dict[str, Any]:
    """One run in a fresh process."""
    command = [sys.executable, __file__, "--one", side, method, "--pattern", pattern]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env)
    print(side, method, done.stdout.splitlines()[-1], flush=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_method(method: str, pattern: str, rounds: int) -> dict[str, Any]:
    """Check, then time both sides in turn: medians, and ratios ours / plain paired by round."""
    bits = child("check", method, pattern)
    runs = [{side: child(side, method, pattern) for side in SIDES} for _ in range(rounds)]
    medians = {s: {k: statistics.median(r[s][k] for r in runs) for k in runs[0][s]} for s in SIDES}
    ratios: dict[str, dict[str, Any]] = {side: {} for side in SIDES[1:]}
    for side, own in ratios.items():
        for key in [key for key in medians["plain"] if key in medians[side]]:
            found = [run[side][key] / run["plain"][key] for run in runs]
            own[key] = {"median": statistics.median(found), "min": min(found), "max": max(found)}
    print(method, json.dumps(ratios, indent=1))
    return {"method": method, "check": bits, "medians": medians, "ratios": ratios, "rounds": runs}


def main() -> None:
    """Run all and write the record; with --one a single run, printed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--output", type=Path, default=RECORD)
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "METHOD"))
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(1)
        print(json.dumps(measure(*given.one, given.pattern)))
        return
    record = {"kind": "pruning speed", "provenance": provenance(), "model": "smollm2",
              "pattern": given.pattern, "dtype": "float32", "threads": 1, "unit": "CPU seconds",
              "calibration": CALIBRATION.model_dump(), "options": OPTIONS}  # fmt: skip
    record["runs"] = [run_method(method, given.pattern, given.rounds) for method in given.methods]
    given.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
