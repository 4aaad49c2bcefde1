"""Quality per byte of SmolLM2-135M: every case of frontier_cases.py, dense and sparse alike.

    python benchmarks/frontier.py --wikitext FOLDER [--cases NAME …] [--samples 16 64]
        [--seeds 0 1 2] [--full] [--model FOLDER] [--output FILE]

FOLDER holds WikiText-2 as `valid` and `test`, .txt or .parquet; without it, the named set
`wikitext2` is taken, whose calibration text is the training split. Calibration: SAMPLES × 256
tokens of valid, order sequential, float32. Perplexity of the packed model, loaded again, float32:
windows of 512 tokens without overlap, the first 8 ("8w") and 16 ("16w") of test, the first 8 of the
held-out pydoc text, and with --full all of test. Every run is a fresh process with one thread; runs
that the record holds are skipped, so a benchmark that was stopped goes on, on another machine if
you like. Writes benchmarks/results/frontier.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pages
import torch
from frontier_cases import CASES, NARROW, SAMPLES, SEQ_LEN, Case
from transformers.utils.logging import disable_progress_bar

from gblm import data
from gblm.errors import InputError
from gblm.evaluate.perplexity import perplexity
from gblm.fetch import fetch
from gblm.methods.base import Stats
from gblm.methods.pipeline import Pipeline, make_pipeline
from gblm.model.folder import ModelFolder
from gblm.model.loading import load_tokenizer
from gblm.packed import load_any
from gblm.provenance import provenance
from gblm.prune import prune
from gblm.recipe import Recipe
from gblm.search.candidates import answer, parse_budget
from gblm.search.examine import Space
from gblm.sparse.patterns import Pattern, parse
from gblm.sparse.values import ValueType
from gblm.sparse.weights import SparseWeight

RECORD = pages.RESULTS / "frontier.json"
NAMED_SET, OTHER = "wikitext2", "pydoc"
WINDOW = 512
PROTOCOLS = {"8w": "WikiText-2, 8w", "16w": "16w", "pydoc 8w": "pydoc, 8w", "full": "all of test"}
Run = dict[str, Any]


class Key(NamedTuple):
    """A key is what makes a run one of its kind; 0 samples: the case needs no calibration."""

    case: str
    samples: int
    seed: int


def key_of(run: Run) -> Key:
    """Give the key of a run of the record."""
    return Key(run["case"], run["samples"], run["seed"])


def is_there(runs: Iterable[Run], key: Key, full: bool) -> bool:
    """Tell whether this run is among some, made as the case now says."""
    case = CASES[key.case]
    return any(
        key_of(run) == key
        and (run["recipe"], run["narrow"]) == (case.recipe, case.narrow)
        and (not full or "full" in run["perplexity"])
        for run in runs
    )


def add(path: Path, run: Run) -> None:
    """Put a run into the record, in the place of an older one of the same key."""
    order = list(CASES)
    runs = {key_of(known): known for known in (*pages.read_runs(path), run)}
    keys = sorted(runs, key=lambda key: (order.index(key.case), key.samples, key.seed))
    pages.write_runs(path, "frontier", {" ".join(map(str, key)): runs[key] for key in keys})


@dataclass(frozen=True)
class NarrowValues(ValueType):
    """These values are int4 whose codes stop at the largest one early."""

    largest: int = 7

    @property
    def limit(self) -> int:
        """See ValueType.limit."""
        return self.largest


@dataclass(frozen=True)
class NarrowPipeline(Pipeline):
    """This pipeline rounds to fewer codes than its value type has; `bits` is a key of NARROW."""

    bits: int = 3

    def prune(
        self,
        weight: torch.Tensor,
        stats: Stats,
        pattern: Pattern,
        values: ValueType,
        name: str = "",
    ) -> SparseWeight:
        """See Pipeline.prune."""
        narrow = NarrowValues(values.kind, values.group_size, NARROW[self.bits])
        return super().prune(weight, stats, pattern, narrow, name)


def prune_case(case: Case, recipe: Recipe, output: Path) -> dict[str, float]:
    """Make the packed folder; gives CPU and wall seconds, bits per pruned weight and zeros."""

    def narrow(*asked: Any) -> Pipeline:
        found = make_pipeline(*asked)
        return NarrowPipeline(found.method, found.refit, found.rounding, case.narrow)

    cpu, wall = time.process_time(), time.monotonic()
    if case.budget:
        recipe = spread_out(recipe, case.budget)
    with mock.patch("gblm.prune.job.make_pipeline", narrow if case.narrow else make_pipeline):
        report = prune(recipe, output)
    return {
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds": round(time.monotonic() - wall, 1),
        "bits_per_weight": round(counted_bits(case, report["bits_per_weight"]), 4),
        "sparsity": report["sparsity"],
    }


def spread_out(recipe: Recipe, budget: str) -> Recipe:
    """Spread a recipe's budget over the linears, unstructured, its values as they are."""
    space = Space((recipe.values,), ("unstructured",))
    rows = answer(recipe, parse_budget(budget), space)["rows"]
    kind = recipe.values.partition(":")[0]
    found = next(row for row in rows if row["name"] == f"{kind} measured")
    return Recipe.from_dict(found["recipe"])


def counted_bits(case: Case, stored: float) -> float:
    """Count the bits per pruned weight, if narrow codes were stored as densely as int4 ones are."""
    if not case.narrow:
        return stored
    return stored - (4 - case.narrow) * (1 - parse(case.recipe["pattern"]).sparsity)


def perplexities(folder: Path, text: str, full: bool) -> dict[str, Any]:
    """Give perplexities of a packed or dense folder by protocol, and hashes of the tokens."""
    tokenizer = load_tokenizer(folder)
    model = load_any(
        folder, "dense" if ModelFolder.open(folder).kind == "packed" else None, torch.float32
    )
    count = None if full else 16
    wiki = data.evaluation_windows(data.read_documents(text, "held-out"), tokenizer, WINDOW, count)
    other = data.evaluation_windows(data.read_documents(OTHER, "held-out"), tokenizer, WINDOW, 8)
    # Each window once: a perplexity of several is the geometric mean of theirs.
    losses = [math.log(perplexity(model, window[None])) for window in wiki]
    found = {"8w": mean_perplexity(losses[:8]), "16w": mean_perplexity(losses[:16]),
             f"{OTHER} 8w": perplexity(model, other)}  # fmt: skip
    if full:
        found["full"] = mean_perplexity(losses)
    sha256 = {"wikitext": data.fingerprint(wiki[:16]), OTHER: data.fingerprint(other)}
    return {"perplexity": found, "tokens_sha256": sha256, "full_windows": len(wiki) * full}


def mean_perplexity(losses: list[float]) -> float:
    """Take exp of the mean loss of windows."""
    return math.exp(sum(losses) / len(losses))


def text_file(folder: Path | None, split: str) -> str:
    """Find the source of WikiText-2 "valid" or "test": a file of the folder, else the named set.

    Raises:
        InputError: the folder has no such file.
    """
    if folder is None:
        return NAMED_SET
    found = [path for path in sorted(folder.glob(f"{split}*")) if path.suffix in data.READERS]
    if not found:
        raise InputError(
            f"{folder} holds no {split}*.txt, .jsonl or .parquet: give --wikitext a folder with "
            f"the valid and test texts of WikiText-2, or leave it out to load {NAMED_SET}."
        )
    return str(found[0])


def measure(key: Key, given: argparse.Namespace) -> Run:
    """Make one run in this process, as the record holds it."""
    case = CASES[key.case]
    model = given.model or fetch("smollm2")
    source, text = text_file(given.wikitext, "valid"), text_file(given.wikitext, "test")
    with tempfile.TemporaryDirectory() as work:
        folder, done = model, {"bits_per_weight": 16, "sparsity": 0}
        if case.recipe:
            folder = Path(work) / "packed"
            recipe = case.build(str(model), source, key.samples or 1, key.seed)
            done = prune_case(case, recipe, folder)
        done |= perplexities(folder, text, given.full)
    return {**key._asdict(), "recipe": case.recipe, "narrow": case.narrow, **done,
            "calibration_text": Path(source).name,
            "command": pages.made_by(), "provenance": provenance()}  # fmt: skip


def keys(given: argparse.Namespace) -> list[Key]:
    """List all runs that are wanted; cases without calibration come once."""
    wanted = {}
    for name in given.cases:
        for samples in given.samples if CASES[name].calibrated else (0,):
            for seed in given.seeds if samples else (0,):
                wanted[Key(name, samples, seed)] = None
    return list(wanted)


@dataclass(frozen=True)
class Row:
    """A row of the table is a case at one calibration size (0 without), one run per seed."""

    name: str
    samples: int
    runs: tuple[Run, ...]

    @property
    def bits(self) -> float:
        """Average the bits per pruned weight over seeds."""
        return statistics.mean(run["bits_per_weight"] for run in self.runs)

    def cells(self, protocols: Iterable[str]) -> list[str]:
        """Print the row."""
        calibrated = [str(self.samples), str(len(self.runs))] if self.samples else ["–", "–"]
        found = [run["cpu_seconds"] / 60 for run in self.runs if "cpu_seconds" in run]
        return [
            CASES[self.name].label,
            f"{self.bits:.2f}",
            *calibrated,
            *(figure([r["perplexity"][p] for r in self.runs if p in r["perplexity"]])
              for p in protocols),
            f"{statistics.mean(found):.1f}" if found else "–",
        ]  # fmt: skip


def figure(values: list[float]) -> str:
    """Print a mean and the standard deviation over seeds, if there are several."""
    if not values:
        return "–"
    mean = statistics.mean(values)
    if len(values) == 1:
        return pages.perplexity(mean)
    deviation = statistics.stdev(values)
    return f"{pages.perplexity(mean)} ± {deviation:.{1 if mean < 1000 else 0}f}"


def rows_of(runs: Iterable[Run]) -> list[Row]:
    """Sort runs by case and calibration size, most bits first.

    Raises:
        ValueError: perplexities are of different texts.
    """
    runs = list(runs)
    if len({str(run["tokens_sha256"]) for run in runs}) > 1:
        raise ValueError("the runs of frontier.json were measured on different texts.")
    alike: dict[tuple[str, int], list[Run]] = {}
    for run in runs:
        alike.setdefault(key_of(run)[:2], []).append(run)
    rows = [Row(name, samples, tuple(runs)) for (name, samples), runs in alike.items()]
    return sorted(rows, key=lambda row: -round(row.bits, 2))


def table(path: Path = RECORD) -> str:
    """Give every case at every calibration size; protocols that no run has are left out."""
    rows = rows_of(pages.read_runs(path))
    runs = [run for row in rows for run in row.runs]
    protocols = [p for p in PROTOCOLS if any(p in run["perplexity"] for run in runs)]
    header = ["SmolLM2-135M", "bits/weight", "samples", "seeds",
              *(PROTOCOLS[protocol] for protocol in protocols), "CPU minutes"]  # fmt: skip
    texts = sorted({run["calibration_text"] for run in runs if run["samples"]})
    return (
        f"{pages.table(header, [row.cells(protocols) for row in rows])}\n\nPerplexity, float32, of "
        f"windows of {WINDOW} tokens: 8w and 16w are the first 8 and 16 of WikiText-2 test; pydoc "
        f"is another domain. Calibration: samples × {SEQ_LEN} tokens of {' or '.join(texts)}; mean "
        "± standard deviation over the seeds. Bits of a pruned weight count masks, row offsets and "
        "scales (of 96 or 128 columns each, in sparse int4 rows of 192, unless the row says "
        "otherwise). CPU minutes are those of `gblm prune`, one thread. "
        f"{pages.origins(runs, 'torch', 'transformers')}"
    )


def main() -> None:
    """Run what is missing; with --one a single run, printed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--samples", nargs="+", type=int, default=SAMPLES)
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--model", type=Path, help="SmolLM2-135M as a folder, if not fetched")
    parser.add_argument("--full", action="store_true", help="all of the test text, too")
    parser.add_argument("--output", type=Path, default=RECORD)
    parser.add_argument("--one", nargs=3, metavar=("CASE", "SAMPLES", "SEED"))
    given = parser.parse_args()
    if given.one:
        name, samples, seed = given.one
        os.nice(15)
        torch.set_num_threads(1)
        disable_progress_bar()
        print(json.dumps(measure(Key(name, int(samples), int(seed)), given)))
        return
    text_file(given.wikitext, "test")
    runs = pages.read_runs(given.output)
    missing = [key for key in keys(given) if not is_there(runs, key, given.full)]
    print(f"{len(missing)} runs", flush=True)
    words = ["--full"] * given.full
    for flag in ("wikitext", "model"):
        if path := getattr(given, flag):
            words += [f"--{flag}", str(path)]
    for key in missing:
        found = pages.alone(__file__, "--one", *map(str, key), *words)
        add(given.output, found)
        print(*key, found["bits_per_weight"], found["perplexity"], flush=True)


if __name__ == "__main__":
    main()
