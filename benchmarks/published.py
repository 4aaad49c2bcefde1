"""Compare with the published GBLM-Pruner code: masks bit by bit, perplexity.

    python benchmarks/published.py REFERENCE [--rounding N]

REFERENCE holds `golden/` (masks and figures of runs of that code) and `data/wikitext-2/`; it is not
part of the repository. Writes benchmarks/results/published-code.json.

With --rounding: SparseGPT alone, of N models whose weights differ by a float32 rounding, which
tells what one run of it is worth. Writes benchmarks/results/published-rounding.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pages
import torch
from safetensors.torch import load_file, save_file

from gblm import data
from gblm.evaluate.perplexity import perplexity
from gblm.fetch import fetch
from gblm.model.folder import ModelFolder
from gblm.model.loading import load_tokenizer
from gblm.model.packed_reader import PackedReader
from gblm.packed import load
from gblm.provenance import provenance
from gblm.prune import prune
from gblm.recipe import Calibration, Recipe

RECORD = pages.RESULTS / "published-code.json"
ROUNDING = pages.RESULTS / "published-rounding.json"
# Standard deviation of what weights are multiplied by: a few units in float32's last place.
ROUNDING_NOISE = 1e-6
# Method, pattern, name of the reference run.
RUNS = (
    ("wanda", "2:4", "wanda_2_4"),
    ("gblm", "2:4", "gblm_l2_2_4"),
    ("wanda", "0.5", "wanda_0.5"),
    ("gblm", "0.5", "gblm_l2_0.5"),
    ("sparsegpt", "2:4", "sparsegpt_2_4"),
    ("sparsegpt", "0.5", "sparsegpt_0.5"),
    ("magnitude", "2:4", "magnitude_2_4"),
    ("magnitude", "0.5", "magnitude_0.5"),
)


def prune_as_published(
    model: Path, reference: Path, method: str, pattern: str, output: Path
) -> None:
    """Prune with the calibration of the reference runs: 16 × 256 tokens of WikiText-2 valid."""
    source = str(reference / "data/wikitext-2/valid.txt")
    calibration = Calibration(source=source, num_samples=16, seq_len=256, seed=0)
    recipe = Recipe(
        model=str(model),
        method=method,
        pattern=pattern,
        options={"gradient_mode": "reference"} if method == "gblm" else {},
        dtype="float32",
        calibration=calibration,
    )
    prune(recipe, output)


def different_bits(packed_folder: Path, masks_file: Path) -> dict[int, float]:
    """Share of mask bits that differ from the reference, by decoder layer."""
    masks = np.load(masks_file)
    different: dict[int, list[int]] = {}
    with PackedReader(ModelFolder.open(packed_folder)) as packed:
        for key in (key for key in masks if not key.endswith(".shape")):
            shape = tuple(masks[f"{key}.shape"])
            want = np.unpackbits(masks[key])[: shape[0] * shape[1]].reshape(shape).astype(bool)
            linear = packed.linears[f"model.layers.{key}"]
            got = linear.fmt.expand(packed.parts(linear.name)) != 0
            count = different.setdefault(int(key.partition(".")[0]), [0, 0])
            count[0] += int((got.numpy() != want).sum())
            count[1] += want.size
    return {layer: wrong / total for layer, (wrong, total) in different.items()}


def perplexity_as_published(packed_folder: Path, reference: Path) -> float:
    """First 16 windows of 512 tokens of WikiText-2 test, bfloat16."""
    documents = data.read_documents(str(reference / "data/wikitext-2/test.txt"), "held-out")
    windows = data.evaluation_windows(documents, load_tokenizer(packed_folder), 512, 16)
    return perplexity(load(packed_folder, "dense", torch.bfloat16), windows)


def measure_rounding(reference: Path, seeds: int) -> dict[str, Any]:
    """Perplexities of SparseGPT, of models that differ by rounding alone."""
    runs = {}
    for method, pattern, name in (run for run in RUNS if run[0] == "sparsegpt"):
        found = []
        for seed in range(seeds):
            with tempfile.TemporaryDirectory() as work:
                model, folder = Path(work) / "model", Path(work) / "out"
                _rounded_otherwise(fetch("smollm2"), seed, model)
                prune_as_published(model, reference, method, pattern, folder)
                found.append(perplexity_as_published(folder, reference))
            print(name, seed, found[-1], flush=True)
        mean = statistics.mean(found)
        runs[name] = {
            "perplexities": found,
            "mean": mean,
            "relative_deviation": statistics.stdev(found) / mean,
        }
    return runs


def _rounded_otherwise(model: Path, seed: int, output: Path) -> None:
    """Copy a model folder, its weights times 1 + ROUNDING_NOISE · N(0, 1)."""
    shutil.copytree(model, output)
    generator = torch.Generator().manual_seed(seed)
    for file in output.glob("*.safetensors"):
        changed = {
            name: tensor.float()
            * (1 + ROUNDING_NOISE * torch.randn(tensor.shape, generator=generator))
            for name, tensor in load_file(file).items()
        }
        save_file(changed, file, metadata={"format": "pt"})


def measure(reference: Path) -> list[dict[str, Any]]:
    """A row for each run of the published code."""
    published = json.loads((reference / "golden/golden.json").read_text())["results"]
    rows: list[dict[str, Any]] = []
    for method, pattern, name in RUNS:
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "out"
            prune_as_published(fetch("smollm2"), reference, method, pattern, folder)
            row = {
                "method": method,
                "pattern": pattern,
                "different_bits": different_bits(folder, reference / f"golden/{name}.npz"),
                "perplexity": perplexity_as_published(folder, reference),
                "perplexity_published_code": published[name]["ppl_bf16_16x512"],
            }
        rows.append(row)
        print(row, flush=True)
    return rows


def table() -> str:
    """Put masks and perplexities beside those of the published code."""
    record = pages.read("published-code")
    cells = []
    for run in record["runs"]:
        different = ", ".join(f"{share:.2%}" for share in run["different_bits"].values())
        theirs = run["perplexity_published_code"]
        cells.append([
            f"{run['method']} {run['pattern']}", different, f"{theirs:.2f}",
            f"{run['perplexity']:.2f}", f"{run['perplexity'] / theirs - 1:+.1%}",
        ])  # fmt: skip
    header = [
        "", "different mask bits in layers 0, 15, 29", "perplexity, published code", "ours",
        "difference",
    ]  # fmt: skip
    return (
        f"{pages.table(header, cells)}\n\n{pages.origin(record, 'torch', 'transformers')}\n\n"
        f"{_rounding()}"
    )


def _rounding() -> str:
    """Say what one run of SparseGPT is worth."""
    record = pages.read("published-rounding")
    runs = [
        f"{name.removeprefix('sparsegpt_').replace('_', ':')}: {run['mean']:.2f} ± "
        f"{run['relative_deviation']:.1%} ({min(run['perplexities']):.2f}–"
        f"{max(run['perplexities']):.2f})"
        for name, run in record["runs"].items()
    ]
    count = len(record["runs"]["sparsegpt_2_4"]["perplexities"])
    return (
        f"SparseGPT amplifies rounding. Perplexity of {count} runs, weights times "
        f"1 + {record['noise']:g} · N(0, 1), mean ± standard deviation and range: "
        f"{'; '.join(runs)}. Record `published-rounding.json`: {pages.origin(record, 'torch')}"
    )


def main() -> None:
    """Run what is asked for and write its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", type=Path)
    parser.add_argument("--rounding", type=int, default=0, metavar="N")
    chosen = parser.parse_args()
    if chosen.rounding:
        runs: Any = measure_rounding(chosen.reference, chosen.rounding)
        record, file = {"kind": "published code, rounding", "noise": ROUNDING_NOISE}, ROUNDING
    else:
        runs, record, file = measure(chosen.reference), {"kind": "published code"}, RECORD
    record |= {"command": pages.made_by(), "provenance": provenance(), "runs": runs}
    pages.write(file, record)


if __name__ == "__main__":
    main()
