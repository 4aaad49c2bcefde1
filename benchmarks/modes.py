"""The ways to run vLLM, with every value type: packed models against their dense-with-zeros selves.

    python benchmarks/modes.py [--modes …] [--models …] [--append] [--minutes M]

Tiny seeded LLaMAs; tokens and log-probs of eight prompts, in the same mode: those of backend
`dense` (expanded at load) must be equal to those of the dense model, those of `cpu` may differ by
rounding. A mode in which vLLM fails with the dense model, too, is recorded with its error; that of
Ray only where Ray is installed. Writes benchmarks/results/modes.json row by row.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pages import made_by

from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder
from gblm.provenance import provenance
from gblm.prune import prune
from gblm.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "tests"))

from conftest import save_tiny_model  # noqa: E402
from vllm_modes import (  # noqa: E402
    COMMON,
    EAGER,
    MODES,
    PIPELINE,
    Mode,
    engine,
    is_in_force,
    tensor_parallel,
    write_adapter,
)
from vllm_run import Answer, answers, farthest, is_same  # noqa: E402

RECORD = ROOT / "benchmarks" / "results" / "modes.json"
MODELS = tuple((p, v) for p in ("2:4", "0.5") for v in ("float", "int8:32", "int4:32"))
BACKENDS = (None, "dense", "cpu")
KV_HEADS = 2
TWO = EAGER | {"tensor_parallel_size": 2}
# Mode, heads of keys and values, ranks that are processes of ours, how vLLM binds its own workers.
Way = tuple[Mode, int, int, str]
WAYS: dict[str, Way] = {
    **{name: (mode, KV_HEADS, 1, "") for name, mode in MODES.items()},
    "TP 2, KV heads split": (tensor_parallel(2), 2, 2, ""),
    "TP 2, KV head replicated": (tensor_parallel(2), 1, 2, ""),
    "TP 4, KV heads replicated": (tensor_parallel(4), 2, 4, ""),
    "TP 2, LoRA": (MODES["LoRA"] | {"settings": MODES["LoRA"]["settings"] | TWO}, 2, 2, ""),
    "TP 2, vLLM's own workers": (
        {"settings": TWO | {"distributed_executor_backend": "mp"}}, KV_HEADS, 1, "nobind",
    ),
    "TP 2, Ray": (
        {"settings": TWO | {"distributed_executor_backend": "ray"}}, KV_HEADS, 1, "nobind",
    ),
    "PP 2, torch.compile": ({"settings": PIPELINE}, KV_HEADS, 1, "nobind"),
    "PP 2, eager": ({"settings": PIPELINE | EAGER}, KV_HEADS, 1, "nobind"),
    "LoRA, log-probs of prompts": (MODES["LoRA"] | {"prompts": True}, KV_HEADS, 1, ""),
}  # fmt: skip
# Where the dense model fails, the packed ones are not tried.
BROKEN = ("TP 2, Ray", "PP 2, eager", "LoRA, log-probs of prompts")
TIMEOUT = 1500


def main() -> None:
    """Run what is asked for; each row is on disk as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--models", nargs="+", default=[" ".join(m) for m in MODELS])
    parser.add_argument("--append", action="store_true", help="keep the rows of the record")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing after them")
    chosen = parser.parse_args()
    commit()
    ends = time.monotonic() + 60 * chosen.minutes
    rows = json.loads(RECORD.read_text())["rows"] if chosen.append and RECORD.exists() else []
    with tempfile.TemporaryDirectory() as root:
        for names in together(chosen.modes):
            if names == ["TP 2, Ray"] and importlib.util.find_spec("ray") is None:
                print("ray is not installed: no row", flush=True)
                continue
            for model in chosen.models:
                if time.monotonic() > ends:
                    return
                if names[0] in BROKEN and model != chosen.models[0]:
                    continue
                print(model, *names, sep=" | ", flush=True)
                for row in compare(Path(root), model, names):
                    rows = [r for r in rows if key(r) != key(row)] + [row]
                    print(row, flush=True)
                save(rows)


def key(row: dict[str, Any]) -> tuple[int, int]:
    """Place of a row in the record."""
    return list(WAYS).index(row["mode"]), [" ".join(m) for m in MODELS].index(row["model"])


def together(names: list[str]) -> list[list[str]]:
    """Modes whose engines share a process: those of one rank, but for the last of MODES."""
    shared = [name for name in list(MODES)[:-1] if name in names]
    return [*([shared] if shared else []), *([name] for name in names if name not in shared)]


def compare(root: Path, model: str, names: list[str]) -> list[dict[str, Any]]:
    """One row per mode, of one model."""
    place = folders(root, model, WAYS[names[0]][1])
    if names[0] in BROKEN:
        got, log = serve(place, names, [None])
        return [row(model, names[0], {} if got else {"dense_model": failure(log)})]
    # After speculation vLLM starts no other engine in its process.
    calls = [[one] for one in BACKENDS] if names == [list(MODES)[-1]] else [list(BACKENDS)]
    found: list[Answer] = []
    for backends in calls:
        got, log = serve(place, names, backends)
        if len(got) < len(names) * len(backends):
            raise SystemExit(f"{model}, {names}, {backends}: {log[-3000:]}")
        found += got
    step = len(names)
    return [row(model, name, facts(name, *found[n::step])) for n, name in enumerate(names)]


def serve(place: Path, names: list[str], backends: list[str | None]) -> tuple[list[Answer], str]:
    """Answers of all modes with the first backend, then of all with the second, …; and the log."""
    _, _, ranks, cores = WAYS[names[0]]
    engines = [
        engine(WAYS[name][0], place / ("dense" if backend is None else "packed"), backend)
        for backend in backends
        for name in names
    ]
    variables = {"VLLM_CPU_OMP_THREADS_BIND": cores} if cores else {}
    return answers(engines, ranks, TIMEOUT, **variables)


def facts(name: str, want: Answer, expanded: Answer, kernel: Answer) -> dict[str, Any]:
    """What a row says."""
    return {
        "in_force": all(is_in_force(name, one) for one in (want, expanded, kernel)),
        "expanded_identical": is_same(expanded, want),
        "drift_expanded": round(farthest(expanded, want), 4),
        "drift_cpu": round(farthest(kernel, want), 4),
        "rounds": sorted(want.keys() - {"counters"}),
    }


def failure(log: str) -> str:
    """The last error that vLLM printed."""
    lines = [line for line in log.splitlines() if "Error" in line]
    return lines[-1].rpartition("] ")[2] if lines else "no answer"


def row(model: str, mode: str, found: dict[str, Any]) -> dict[str, Any]:
    """With where it comes from."""
    return {"mode": mode, "model": model, **found, "commit": commit()}


@functools.cache
def commit() -> str | None:
    """Of the tree as it was before the record was written."""
    found: str | None = provenance()["commit"]
    return found


def folders(root: Path, model: str, kv_heads: int) -> Path:
    """Packed and dense folder and adapter of a model, made once."""
    pattern, values = model.split()
    place = root / f"{kv_heads}-{MODELS.index((pattern, values))}"
    if not place.exists():
        save_tiny_model(place / "model", num_key_value_heads=kv_heads)
        recipe = Recipe(model=str(place / "model"), method="magnitude", pattern=pattern,
                        values=values, calibration=None)  # fmt: skip
        prune(recipe, place / "packed")
        export_dense(ModelFolder.open(place / "packed"), place / "dense")
        write_adapter(place / "packed", place / "adapter")
        shutil.rmtree(place / "model")
    return place


def save(rows: list[dict[str, Any]]) -> None:
    """Write the record."""
    record = {
        "kind": "modes", "command": made_by(), "provenance": provenance(), "common": COMMON,
        "rows": sorted(rows, key=key),
    }  # fmt: skip
    RECORD.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
