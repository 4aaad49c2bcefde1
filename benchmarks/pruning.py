"""CPU seconds of pruning: gblm against the papers' algorithm written plainly, in turn.

    python benchmarks/pruning.py [--rounds 3] [--methods wanda gblm sparsegpt] [--check]

SmolLM2-135M, float32, 16 × 256 tokens, batch 1; every run is a fresh process with one thread. The
plain side is benchmarks/plain.py; ours runs in both orders. The plain "total" leaves "setup" out
(model, tokenizer, text); ours is the whole of prune(), and its "pruning" packs and writes too.
"""

from __future__ import annotations

import argparse
import json
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
from pages import made_by
from plain import linears, plain_gradients, plain_prune
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gblm import data
from gblm.fetch import fetch
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
from gblm.provenance import provenance
from gblm.prune import prune
from gblm.recipe import Calibration, Recipe
from gblm.sparse.patterns import parse

RECORD = Path(__file__).resolve().parent / "results" / "pruning-speed.json"
METHODS, SIDES = ("wanda", "sparsegpt", "gblm"), ("plain", "ours", "sequential")
CALIBRATION = Calibration(source="pydoc", num_samples=16, seq_len=256, seed=0, batch_size=1)
# Ours is given options only where its defaults are not the published method.
OPTIONS: dict[str, dict[str, Any]] = {"gblm": {"gradient_mode": "reference"}}


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
    with PackedReader(ModelFolder.open(output)) as packed:
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


def run_method(method: str, pattern: str, rounds: int, check: bool) -> dict[str, Any]:
    """Time all sides in turn: medians, and ratios ours / plain paired by round."""
    runs = [{side: child(side, method, pattern) for side in SIDES} for _ in range(rounds)]
    medians = {s: {k: statistics.median(r[s][k] for r in runs) for k in runs[0][s]} for s in SIDES}
    ratios: dict[str, dict[str, Any]] = {side: {} for side in SIDES[1:]}
    for side, own in ratios.items():
        for key in [key for key in medians["plain"] if key in medians[side]]:
            found = [run[side][key] / run["plain"][key] for run in runs]
            own[key] = {"median": statistics.median(found), "min": min(found), "max": max(found)}
    print(method, json.dumps(ratios, indent=1))
    bits = child("check", method, pattern) if check else None
    return {"method": method, "check": bits, "medians": medians, "ratios": ratios, "rounds": runs}


def main() -> None:
    """Run all and write the record; with --one a single run, printed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--output", type=Path, default=RECORD)
    parser.add_argument("--check", action="store_true", help="compare the masks, too")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "METHOD"))
    given = parser.parse_args()
    if given.one:
        torch.set_num_threads(1)
        print(json.dumps(measure(*given.one, given.pattern)))
        return
    record = {"kind": "pruning speed", "command": made_by(),
              "provenance": provenance(), "model": "smollm2",
              "pattern": given.pattern, "dtype": "float32", "threads": 1, "unit": "CPU seconds",
              "calibration": CALIBRATION.model_dump(), "options": OPTIONS}  # fmt: skip
    record["runs"] = []
    for method in given.methods:
        record["runs"].append(run_method(method, given.pattern, given.rounds, given.check))
        given.output.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
