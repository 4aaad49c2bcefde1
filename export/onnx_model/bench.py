"""`gblm bench onnx`: exported folders against each other in ONNX Runtime, in interleaved rounds.

With one thread times are CPU time of the thread, so that other processes count less; with more,
wall time. Load time and memory are measured in a process of its own for each folder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gblm.bench.paired import round_medians, speedup, spread
from gblm.errors import CheckpointError, UsageError
from gblm.export.onnx_model.decoder import OrtDecoder
from gblm.export.onnx_model.runtime import MODEL_FILE, REPORT_FILE
from gblm.export.onnx_model.storage import DATA_FILE
from gblm.folder import read_config, read_json_object
from gblm.progress import Progress, no_progress
from gblm.provenance import machine, provenance

WARM_UP = 2


@dataclass(frozen=True)
class Settings:
    """How folders are measured.

    Attributes:
        threads: of ONNX Runtime.
        prompt_len: tokens of the prefill, and in the cache when decoding begins.
        output_len: tokens that are decoded in a round.
        rounds: interleaved.
        seed: of the prompt's tokens.
    """

    threads: int = 1
    prompt_len: int = 64
    output_len: int = 32
    rounds: int = 7
    seed: int = 0


def bench_onnx(
    folders: Sequence[Path],
    settings: Settings | None = None,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Measure exported folders; the first one is the baseline of all ratios.

    Args:
        folders: as `export_onnx` wrote them, of different names.
        settings: sizes and rounds.
        progress: for a progress bar.

    Returns:
        The record: a row for each folder.

    Raises:
        UsageError: two folders have one name, or one was exported for CUDA.
        CheckpointError: a folder is no export.
    """
    settings = settings or Settings()
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        raise UsageError("bench onnx: the folders must have different names, which name the rows.")
    for folder in folders:
        _check_target(folder)
    step = progress("measuring", len(folders) + settings.rounds + 1)
    alone = {}
    for name, folder in zip(names, folders, strict=True):
        alone[name] = _alone(folder, settings.threads)
        step()
    decoders = {
        name: OrtDecoder(folder, threads=settings.threads)
        for name, folder in zip(names, folders, strict=True)
    }
    vocabulary = int(read_config(folders[0])["vocab_size"])
    times = _measure(decoders, vocabulary, settings, step)
    rows = [
        {
            "name": name,
            "file_bytes": _file_bytes(folder),
            "providers": decoders[name].session.get_providers(),
            **alone[name],
            **_row(name, names, times),
        }
        for name, folder in zip(names, folders, strict=True)
    ]
    return {
        "kind": "onnx",
        "settings": asdict(settings),
        "clock": "CPU time of the thread" if settings.threads == 1 else "wall time",
        "load_average": os.getloadavg()[0],
        "machine": machine(),
        "provenance": provenance(),
        "rows": rows,
    }


def _check_target(folder: Path) -> None:
    report = folder / REPORT_FILE
    if report.is_file() and read_json_object(report).get("target") == "cuda":
        raise UsageError(
            f"{folder} was exported for CUDA, and bench onnx times ONNX Runtime on CPU: export it "
            "with --target cpu."
        )


Times = dict[str, dict[str, list[list[float]]]]


def _measure(
    decoders: dict[str, OrtDecoder], vocabulary: int, settings: Settings, step: Callable[[], None]
) -> Times:
    """Seconds by phase, folder, round and call. The first round warms up."""
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = torch.randint(vocabulary, (settings.prompt_len + 1,), generator=generator)
    prompt, token = tokens[:-1], tokens[-1:]
    clock = time.thread_time if settings.threads == 1 else time.perf_counter
    times: Times = {phase: {name: [] for name in decoders} for phase in ("prefill", "decode")}
    for number in range(settings.rounds + 1):
        # The order alternates, so that drift of the machine hits all alike.
        for name in decoders if number % 2 else reversed(decoders):
            decoder = decoders[name]
            # Not timed: threads of the session before still spin, and take time from this one's.
            decoder.reset()
            decoder.run(prompt)
            decoder.reset()
            prefill = _seconds(lambda: decoder.run(prompt), clock)  # noqa: B023
            decode = [
                _seconds(lambda: decoder.run(token), clock)  # noqa: B023
                for _ in range(settings.output_len + WARM_UP)
            ]
            if number:
                times["prefill"][name].append([prefill])
                times["decode"][name].append(decode[WARM_UP:])
        step()
    return times


def _seconds(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    began = clock()
    call()
    return clock() - began


def _row(name: str, names: Sequence[str], times: Times) -> dict[str, Any]:
    """Medians of the rounds in ms, and how often faster than each other folder."""
    found: dict[str, Any] = {}
    for phase, by_name in times.items():
        found[f"{phase}_ms"] = spread([1e3 * median for median in round_medians(by_name[name])])
        found[f"{phase}_speedup"] = {
            other: speedup(by_name, name, other) for other in names if other != name
        }
    return found


def _file_bytes(folder: Path) -> int:
    """The graph and its weights."""
    return sum((folder / file).stat().st_size for file in (MODEL_FILE, DATA_FILE))


def _alone(folder: Path, threads: int) -> dict[str, float]:
    """Load time and memory of one folder, in a process that does nothing else."""
    command = [sys.executable, "-m", __name__, str(folder), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise CheckpointError(f"{folder} cannot be run: {said[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _load(folder: Path, threads: int) -> dict[str, float]:
    """Seconds until the first token is there, and what the process then holds more."""
    # Not counted: what importing costs, whichever model it is.
    import onnxruntime  # noqa: F401
    import psutil

    process = psutil.Process()
    before, began = process.memory_info().rss, time.perf_counter()
    decoder = OrtDecoder(folder, threads=threads)
    decoder.run(torch.tensor([0]))
    seconds = time.perf_counter() - began
    return {"load_s": seconds, "memory_bytes": process.memory_info().rss - before}


if __name__ == "__main__":
    print(json.dumps(_load(Path(sys.argv[1]), int(sys.argv[2]))))
