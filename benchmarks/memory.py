"""Memory, disk and time of `gblm prune` for three sizes of model.

    python benchmarks/memory.py [--sizes smollm2 tinyllama …] [--methods …] [--folder DIR]

SmolLM2-135M is real; the others are LLaMA shapes with random bf16 weights, made once in the
folder, which takes 14 GB for llama2 and up to 41 GB more during its gblm run. Each run is a process
of two threads; memory is its ru_maxrss, disk the most that its output and work folder hold. Writes
benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pages
from shapes import model_folder

from gblm.provenance import provenance
from gblm.record import Record, Row

RECORD = pages.RESULTS / "memory.json"
METHODS = ("wanda", "gblm", "sparsegpt", "alps")
SIZES = ("smollm2", "tinyllama", "llama2", "olmoe", "qwen3moe")
# Samples and tokens of them: fewer for large shapes.
TEXT, LARGE = {"smollm2": (16, 256)}, (4, 128)
# Threads that wait by spinning stand still when they share two cores with other work.
THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
POLL_SECONDS = 0.1
UNITS = {
    "peak_rss_bytes": "bytes", "disk_peak_bytes": "bytes", "output_bytes": "bytes",
    "seconds": "s", "cpu_seconds": "s",
}  # fmt: skip


def measure(root: Path, size: str, method: str) -> tuple[dict[str, Any], list[Row]]:
    """Prune a model; gives what the run is, and what it took."""
    model, (samples, tokens) = model_folder(root, size), TEXT.get(size, LARGE)
    words = [
        "prune", str(model), "--method", method, "--pattern", "2:4", "--calibration", "pydoc",
        "--num-samples", str(samples), "--seq-len", str(tokens),
    ]  # fmt: skip
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=root, prefix="run-") as folder:
        measured = watch(Path(folder), *words, "--output", f"{folder}/out")
    facts = {
        "size": size, "method": method, "samples": samples, "seq_len": tokens,
        "load_average_at_start": round(load, 1), "provenance": provenance(),
    }  # fmt: skip
    asked = f"prune to 2:4, {samples} × {tokens} tokens"
    return facts, [
        Row(f"{size} {method}", asked, metric, UNITS[metric], value)
        for metric, value in measured.items()
    ]


def watch(folder: Path, *words: str) -> dict[str, float]:
    """Run a command of gblm; memory, disk and time as the system saw them."""
    began, peak = time.monotonic(), 0
    process = subprocess.Popen([sys.executable, "-m", "gblm", *words], env=os.environ | THREADS)
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        peak = max(peak, used(folder))
        time.sleep(POLL_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"gblm {' '.join(words)} failed: exit {process.returncode}")
    return {
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "disk_peak_bytes": peak,
        "output_bytes": used(folder / "out"),
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }


def used(folder: Path) -> int:
    """Count the bytes of the files below a folder; files may vanish meanwhile."""
    total = 0
    for path, _, files in os.walk(folder):
        for file in files:
            try:
                total += (Path(path) / file).stat().st_size
            except FileNotFoundError:
                continue
    return total


def save(facts: dict[str, Any], rows: list[Row]) -> None:
    """Put a run into the record, in the place of an older one of the same name."""
    older = Record.read(RECORD) if RECORD.exists() else None
    name = rows[0].side
    known = {**(older.sides if older else {}), name: facts}
    order = sorted(known, key=lambda side: (SIZES.index(known[side]["size"]),
                                            METHODS.index(known[side]["method"])))  # fmt: skip
    kept = [row for row in older.rows if row.side != name] if older else []
    record = Record(
        kind="memory", command=pages.made_by(), sides={side: known[side] for side in order},
        rows=tuple(sorted([*kept, *rows], key=lambda row: order.index(row.side))),
        provenance=provenance() | {"threads": THREADS},
    )  # fmt: skip
    pages.save(record, RECORD)


def table() -> str:
    """Give what each run took."""
    record = Record.read(RECORD)
    cells = []
    for side, run in record.sides.items():
        took = {row.metric: row.value or 0.0 for row in record.rows if row.side == side}
        cells.append([
            f"{pages.MODELS[run['size']]}, {run['method']}, {run['samples']} × {run['seq_len']} "
            "tokens",
            f"{took['peak_rss_bytes'] / 1e9:.2f}", f"{took['disk_peak_bytes'] / 1e9:.2f}",
            f"{took['seconds']:.0f}", f"{run['load_average_at_start']:.1f}",
        ])  # fmt: skip
    header = ["2:4", "peak RAM, GB", "peak disk, GB", "seconds", "load before"]
    return (
        f"{pages.table(header, cells)}\n\nThe load average at the start tells how many other "
        f"processes shared the {record.provenance['machine']['cores']} cores. "
        f"{pages.origins(record.sides.values(), 'torch', 'transformers')}"
    )


def main() -> None:
    """Measure what is asked for; each row is on disk as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "gblm-shapes",
        help="for models and runs",
    )  # fmt: skip
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    for size in chosen.sizes:
        for method in chosen.methods:
            facts, rows = measure(chosen.folder, size, method)
            save(facts, rows)
            print(size, method, {row.metric: row.value for row in rows}, flush=True)


if __name__ == "__main__":
    main()
