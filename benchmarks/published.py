"""Compare with the published GBLM-Pruner code: masks bit by bit, perplexity.

    python benchmarks/published.py REFERENCE

REFERENCE holds `golden/` (masks and figures of runs of that code) and `data/wikitext-2/`; it is not
part of the repository. Writes benchmarks/results/published-code.json.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pages
import torch

from gblm import data
from gblm.evaluate.perplexity import perplexity
from gblm.fetch import fetch
from gblm.model.folder import ModelFolder
from gblm.model.loading import fast_dtype, load_tokenizer
from gblm.model.packed_reader import PackedReader
from gblm.packed import load
from gblm.provenance import provenance
from gblm.prune import prune
from gblm.recipe import Calibration, Recipe
from gblm.record import Record, Row

RECORD = pages.RESULTS / "published-code.json"
OURS, THEIRS, DIFFERENT = "gblm", "published code", "different_mask_bits_layer_"
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
    """First 16 windows of 512 tokens of WikiText-2 test, bfloat16 where the CPU multiplies that."""
    documents = data.read_documents(str(reference / "data/wikitext-2/test.txt"), "held-out")
    windows = data.evaluation_windows(documents, load_tokenizer(packed_folder), 512, 16)
    return perplexity(load(packed_folder, "dense", fast_dtype(torch.bfloat16)), windows)


def measure(reference: Path) -> list[Row]:
    """Give both perplexities and the shares of mask bits that differ, by run."""
    published = json.loads((reference / "golden/golden.json").read_text())["results"]
    rows: list[Row] = []
    for method, pattern, name in RUNS:
        run, theirs = f"{method} {pattern}", published[name]["ppl_bf16_16x512"]
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "out"
            prune_as_published(fetch("smollm2"), reference, method, pattern, folder)
            ours = perplexity_as_published(folder, reference)
            bits = different_bits(folder, reference / f"golden/{name}.npz")
        rows += [
            Row(THEIRS, run, "perplexity", "", theirs), Row(OURS, run, "perplexity", "", ours),
            *(Row(OURS, run, f"{DIFFERENT}{layer}", "share", n) for layer, n in bits.items()),
        ]  # fmt: skip
        print(run, ours, theirs, bits, flush=True)
    return rows


def table() -> str:
    """Put masks and perplexities beside those of the published code."""
    record = Record.read(RECORD)
    cells = []
    for run in record.loads:
        bits = (row for row in record.rows if row.load == run and row.metric.startswith(DIFFERENT))
        theirs = record.value(THEIRS, run, "perplexity") or math.nan
        ours = record.value(OURS, run, "perplexity") or math.nan
        cells.append([
            run, ", ".join(f"{row.value:.2%}" for row in bits), f"{theirs:.2f}", f"{ours:.2f}",
            f"{ours / theirs - 1:+.1%}",
        ])  # fmt: skip
    header = [
        "", "different mask bits in layers 0, 15, 29", "perplexity, published code", "ours",
        "difference",
    ]  # fmt: skip
    return (
        f"{pages.table(header, cells)}\n\n{pages.origin(record.as_json(), 'torch', 'transformers')}"
    )


def main() -> None:
    """Run what is asked for and write its record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", type=Path)
    reference, origin = parser.parse_args().reference, provenance()
    rows = measure(reference)
    sides: dict[str, dict[str, Any]] = {OURS: {}, THEIRS: {}}
    record = Record(
        "published code", sides, tuple(rows), THEIRS, provenance=origin, command=pages.made_by()
    )
    pages.save(record, RECORD)


if __name__ == "__main__":
    main()
