"""Every method × pattern × value type on a real model: perplexity, size, cost.

    python benchmarks/matrix.py [--model smollm2|gemma3-270m]

Only commands of gblm are used, those of the README. A method that only chooses a mask prunes once
per pattern; its zeros are then packed again with rounded values (`gblm export pack`). Methods that
change weights (sparsegpt, alps) prune once per value type and round jointly (`--rounding obs`).
Each family, a method and a pattern, is a process with one thread; cells that the record holds are
skipped, so a benchmark that was stopped goes on. Writes benchmarks/results/matrix-MODEL.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import pages

from gblm.cli import cli
from gblm.fetch import fetch
from gblm.provenance import provenance
from gblm.record import Record

MODELS = ("smollm2", "gemma3-270m")
MASKS = ("magnitude", "wanda", "gblm")
UPDATES = ("sparsegpt", "alps")
METHODS = (*MASKS, *UPDATES)
PATTERNS = ("2:4", "4:8", "8:16", "0.5", "0.7")
VALUES = ("float", "int8", "int4")
# "dense" keeps all: "nearest" rounds each weight alone, "gptq" is sparsegpt without a mask.
ROUNDINGS = ("nearest", "gptq")
CALIBRATION = (
    "--calibration pydoc --num-samples 16 --seq-len 256 --seed 0 --dtype float32 --order sequential"
)
TEXT = "--text pydoc --seq-len 512 --max-windows 8 --dtype bfloat16 --no-baseline"
SHORT = {"float": "bf16", "int8": "int8", "int4": "int4"}
Cell = dict[str, Any]
Cells = dict[tuple[str, str, str], Cell]


def families() -> list[tuple[str, str]]:
    """Give method and pattern of each process; the dense model and its roundings come first."""
    masked = [(method, pattern) for pattern in PATTERNS for method in METHODS]
    return [("none", "dense"), *((name, "dense") for name in ROUNDINGS), *masked]


def cells_of(method: str, pattern: str) -> list[tuple[str, str, str]]:
    """Give method, pattern and values of what one process measures."""
    values = {"none": VALUES[:1], "nearest": VALUES[1:], "gptq": VALUES[1:]}.get(method, VALUES)
    return [(method, pattern, kind) for kind in values]


class Family:
    """A family makes the folders of a method and a pattern, and measures them."""

    def __init__(self, name: str, root: Path, method: str, pattern: str) -> None:
        self.name, self.model, self.root = name, fetch(name), root
        self.method, self.pattern = method, pattern

    def measure(self) -> list[Cell]:
        """Make a cell for each value type."""
        return [self._cell(kind) for _, _, kind in cells_of(self.method, self.pattern)]

    def _cell(self, values: str) -> Cell:
        cpu = time.process_time()
        folder, command = self._make(values)
        made = time.process_time() - cpu
        record = self.root / f"{values}.json"
        gblm(f"eval {folder} {TEXT} --output {record}")
        found = Record.read(record).rows[0]
        cell: Cell = {
            "method": self.method, "pattern": self.pattern, "values": values,
            "command": command,
            "perplexity": {found.load: found.value}, "cpu_seconds": round(made, 1),
            "provenance": provenance(),
        }  # fmt: skip
        if folder != self.model:
            report = json.loads((folder / "sparsity_report.json").read_text())
            keys = ("sparsity", "bits_per_weight", "bytes_packed", "bytes_dense")
            cell |= {key: report[key] for key in keys}
        return cell

    def _make(self, values: str) -> tuple[Path, str]:
        """Make the packed folder; gives the command that a reader would give, too."""
        folder = self.root / values
        if self.method == "none":
            return self.model, ""
        if self.method == "nearest":
            options = f"--pattern dense --values {values}"
            gblm(f"export pack {self.model} {options} --output {folder}")
            return folder, f"gblm export pack {self.name} {options}"
        if self.method in MASKS and values != "float":
            return folder, self._round(values, folder)
        method = "sparsegpt" if self.method == "gptq" else self.method
        options = f"--method {method} --pattern {self.pattern} --values {values}"
        if values != "float":
            options += " --rounding obs"
        if method != "magnitude":
            options += f" {CALIBRATION}"
        gblm(f"prune {self.model} {options} --output {folder}")
        return folder, f"gblm prune {self.name} {options}"

    def _round(self, values: str, folder: Path) -> str:
        """Pack the same zeros with rounded values."""
        dense = self.root / "zeros"
        if not dense.exists():
            gblm(f"export dense {self.root / 'float'} --output {dense}")
        options = f"--pattern {self.pattern} --values {values}"
        gblm(f"export pack {dense} {options} --output {folder}")
        return f"gblm export dense PRUNED --output ZEROS && gblm export pack ZEROS {options}"


def gblm(arguments: str) -> None:
    """Run a command of gblm in this process, whose CPU time is counted."""
    cli(["--quiet", "--no-progress", *arguments.split()], standalone_mode=False)


def record_of(model: str) -> Path:
    """Name the file that holds the cells of a model."""
    return pages.RESULTS / f"matrix-{model}.json"


def add(model: str, cells: list[Cell]) -> None:
    """Put cells into a model's record."""
    known = cells_of_record(model) | {key_of(cell): cell for cell in cells}
    pages.write_runs(record_of(model), "matrix", {" ".join(k): c for k, c in known.items()})


def cells_of_record(model: str) -> Cells:
    """Give the cells that a model's record holds, by method, pattern and values."""
    return {key_of(cell): cell for cell in pages.read_runs(record_of(model))}


def key_of(cell: Cell) -> tuple[str, str, str]:
    """Give method, pattern and values of a cell."""
    return cell["method"], cell["pattern"], cell["values"]


def perplexity_of(cell: Cell) -> float:
    """Give the perplexity of a cell, which has one text."""
    (value,) = cell["perplexity"].values()
    return float(value)


def table() -> str:
    """Give perplexity of every method, pattern and value type, a table for each real model."""
    return "\n\n".join(_table(model, cells_of_record(model)) for model in MODELS)


def _table(model: str, cells: Cells) -> str:
    dense = cells["none", "dense", "float"]
    rows = [["dense", "–", pages.perplexity(perplexity_of(dense)), "–", "–", "–"]]
    for name, label in (("nearest", "rounded to the nearest"), ("gptq", "rounded by GPTQ")):
        rows.append(["dense", label, "–", *_perplexities(cells, name, "dense")[1:], "–"])
    patterns = dict.fromkeys(pattern for _, pattern, _ in cells if pattern != "dense")
    for pattern in sorted(patterns, key=PATTERNS.index):
        for method in (m for m in METHODS if (m, pattern, "float") in cells):
            seconds = cells[method, pattern, "float"]["cpu_seconds"]
            rows.append([pattern, method, *_perplexities(cells, method, pattern), f"{seconds:.0f}"])
    masks = [method for method in MASKS if any(key[0] == method for key in cells)]
    header = [pages.MODELS[model], "method", *SHORT.values(), "CPU seconds"]
    (protocol,) = dense["perplexity"]
    return (
        f"{pages.table(header, rows)}\n\nPerplexity: {protocol}; lower is better. "
        "Calibration: 16 × 256 tokens of the other part of that text, `--order sequential`, one "
        f"seed. After a mask of {', '.join(masks)} values are rounded to the nearest; "
        "sparsegpt and alps round jointly (`--rounding obs`). CPU seconds: pruning to bf16 with "
        f"one thread, writing included. {pages.origins(cells.values(), 'torch')}"
    )


def _perplexities(cells: Cells, method: str, pattern: str) -> list[str]:
    found = (cells.get((method, pattern, kind)) for kind in VALUES)
    return [pages.perplexity(perplexity_of(cell)) if cell else "–" for cell in found]


def sizes() -> str:
    """Give bits per weight and file size of SmolLM2, which no method changes."""
    cells, rows = cells_of_record("smollm2"), []
    for pattern in ("dense", *PATTERNS):
        method = "nearest" if pattern == "dense" else "magnitude"
        row = [pattern]
        for kind in SHORT:
            # The dense model itself is not packed.
            cell = cells.get((method, pattern, kind), {"bits_per_weight": 16.0})
            size = cell.get("bytes_packed", cells["magnitude", "2:4", "float"]["bytes_dense"])
            row.append(f"{cell['bits_per_weight']:.2f} · {size / 1e6:.0f}")
        rows.append(row)
    return pages.table(["bits per pruned weight · MB of tensors", *SHORT.values()], rows)


def main() -> None:
    """Run the families that are missing; with --one a single one, its cells printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--one", nargs=2, metavar=("METHOD", "PATTERN"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as root:
            print(json.dumps(Family(given.model, Path(root), *given.one).measure()))
        return
    for family in families():
        if cells_of_record(given.model).keys() >= set(cells_of(*family)):
            continue
        print(*family, flush=True)
        add(given.model, pages.alone(__file__, "--model", given.model, "--one", *family))


if __name__ == "__main__":
    main()
