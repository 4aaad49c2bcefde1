"""What pruning and rounding cost real models, and how far these come back, dense integers alike.

    python benchmarks/recovery.py [--model smollm2|gemma3-270m|…] [--cells "8:16 int8" …]
        [--preset recovered] [--dense-ends 1] [--shrinkage 0.33] [--head int8] [--methods alps …]
        [--tokens 65536 …] [--seed 0] [--wikitext test.txt]

Each cell, a pattern and a value type, prunes (`gblm prune --preset …`) and recovers (`gblm
recover`, once for each of the `--tokens`) with one thread; "8:16@3.7bits int4" and
"unstructured@3.2bits int4" spread a budget (`--budget`), "dense@3.7bits mixed" by value types
alone; "keep7 reap" removes experts of a mixture instead. `--preset fast --tokens 0` only prunes. KL
and perplexity are those that `gblm recover` tells before and after, on 16 windows of 256 tokens of
texts that no step has seen. Cells are added to benchmarks/results/recovery-MODEL.json; another seed
is another round of the same row.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import tempfile
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pages
from shapes import SPLIT, model_folder

from gblm.provenance import provenance
from gblm.record import Record, Row

MODELS = ("smollm2", "gemma3-270m", SPLIT)
CELLS = ("8:16 int8", "dense int4", "8:16 int4", "dense int8", "2:4 int8", "0.5 int8")
METRICS = {"kl": "nats", "top1": "", "perplexity": ""}
DENSE = "dense bf16"
# Values of a cell that leaves them to the budget.
MIXED = "mixed"
# What `plain` shows, of what there is.
METHODS = ("magnitude", "wanda", "gblm", "sparsegpt", "alps")
SPARSE = ("2:4", "4:8", "8:16", "0.5")
VALUES = ("float", "int8", "int4")


def record_of(model: str) -> Path:
    """Name the file of a model's record."""
    return pages.RESULTS / f"recovery-{model}.json"


def side_name(
    pattern: str, values: str, epochs: int = 0, tokens: int = 0, *,
    head: str = "", ends: int = 0, method: str = "alps", whole: bool = False,
) -> str:  # fmt: skip
    """Name a row, such as "int8 8:16, alps, reconstructed, recovered on 65536 tokens"."""
    words = [f"{values} {pattern}"]
    words += [f"{pages.counted(ends, 'layer')} dense at each end"] if ends else []
    if "@" in pattern:
        spread, bits = pattern.removesuffix("bits").split("@")
        spreads = {"unstructured": "zeros anywhere", "dense": "dense"}
        words = [f"{values} {spreads.get(spread, f'{spread} or dense')}, {bits} bits"]
    words += ["int4 head"] * (head == "int4")
    words += ["GPTQ" if pattern.startswith("dense") else method] + ["not shrunk"] * whole
    words += ["reconstructed" + (f" {epochs} times" if epochs != 1 else "")] * bool(epochs)
    return ", ".join(words + [f"recovered on {tokens} tokens"] * bool(tokens))


def texts(given: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Give the held-out texts by name; those of other domains than the training's come first."""
    found = {"descriptions": str(pages.descriptions(folder))}
    if given.wikitext is not None:
        found["WikiText-2"] = str(given.wikitext)
    return found | {"pydoc": "pydoc", "self": "self"}


def measure(
    model: Path, cell: str, method: str, given: argparse.Namespace, folder: Path
) -> tuple[dict[str, Any], list[Row]]:
    """Prune once, recover on each number of tokens; gives facts of all sides, and their rows."""
    pattern, values = cell.split()
    pruned, held_out = folder / "pruned", texts(given, folder)
    spread, _, budget = pattern.partition("@")
    how = f"--preset {given.preset} --recover 0 --method {method}"
    how += f" --seed {given.seed} --pattern {spread}" + f" --budget {budget}" * bool(budget)
    how += f" --values {values}" * (values != MIXED)
    if (given.dense_ends is not None or pattern == "dense") and not budget:
        how += f" --dense-ends {given.dense_ends or 0}"
    how += "" if given.shrinkage is None else f" --shrinkage {given.shrinkage}"
    how += f" --head {given.head}" * bool(given.head)
    first, cpu = gblm(f"prune {model} {how} --output {pruned}")
    recipe = json.loads((pruned / "recipe.json").read_text())
    epochs = 0 if recipe["reconstruct"] is None else recipe["reconstruct"]["epochs"]
    how_named = {"ends": recipe["dense_ends"], "method": method, "head": recipe["head"]}
    how_named["whole"] = (recipe["calibration"] or {}).get("shrinkage") == 0
    facts = {
        "bits_per_weight": first["bits_per_weight"], "bytes": first["bytes_packed"],
        "provenance": provenance(), "prune": f"gblm prune {how}",
    }  # fmt: skip
    before = side_name(pattern, values, epochs, **how_named)
    sides: dict[str, Any] = {
        before: facts | {"cpu_seconds": cpu},
        DENSE: {"bits_per_weight": 16.0, "bytes": first["bytes_dense"]},
    }
    rows = []
    if 0 in given.tokens:
        rows = _rows(before, evaluated(pruned, model, held_out), held_out)
    for tokens in filter(None, given.tokens):
        training = f"--tokens {tokens} --seed {given.seed}"
        then, cpu_more = recovered(pruned, training, held_out)
        rows = rows or _rows(before, then["before"], held_out)
        # A recovery that does not lower KL leaves the model as it was: that is no row.
        if then["kept"]:
            name = side_name(pattern, values, epochs, tokens, **how_named)
            more = {"recover": f"gblm recover {training}", "losses": then["losses"]}
            sides[name] = facts | {"cpu_seconds": cpu + cpu_more} | more
            rows += _rows(name, then["after"], held_out, dense=False)
    return sides, rows


def recovered(pruned: Path, how: str, held_out: dict[str, str]) -> tuple[dict[str, Any], float]:
    """Recover a model; gives what the command says, and the seconds of CPU it took."""
    others = " ".join(f"--held-out {path}" for path in held_out.values())
    with tempfile.TemporaryDirectory(dir=pruned.parent) as folder:
        return gblm(f"recover {pruned} {how} {others} --output {folder}/recovered")


def remove(
    model: Path, cell: str, given: argparse.Namespace, folder: Path
) -> tuple[dict[str, Any], list[Row]]:
    """Remove experts of a mixture; gives what `measure` gives."""
    keep, by = cell.removeprefix("keep").split()
    how = f"--keep {keep} --by {by} --num-samples 64 --seq-len 512 --seed {given.seed}"
    held_out = texts(given, folder)
    report, cpu = gblm(f"experts {model} {how} --output {folder / 'fewer'}")
    name = f"{keep} of {report['experts']} experts, by {by}"
    facts = {
        "bits_per_weight": 16.0, "bytes": report["bytes_after"], "cpu_seconds": cpu,
        "provenance": provenance(), "experts": f"gblm experts {how}",
    }  # fmt: skip
    return {name: facts}, _rows(name, evaluated(folder / "fewer", model, held_out), held_out)


def _rows(
    side: str, found: dict[str, Any], held_out: dict[str, str], *, dense: bool = True
) -> list[Row]:
    """Give a side's figures of each text, and with `dense` the dense model's."""
    rows = []
    for text, path in held_out.items():
        of_text = found.get(Path(path).name)
        if of_text is None:
            continue
        rows += [Row.of_rounds(side, text, m, unit, [of_text[m]]) for m, unit in METRICS.items()]
        if dense:
            perplexity = [of_text["perplexity_dense"]]
            rows.append(Row.of_rounds(DENSE, text, "perplexity", "", perplexity))
    return rows


def evaluated(pruned: Path, model: Path, held_out: dict[str, str]) -> dict[str, Any]:
    """Measure a model that is not recovered, but for the text that the dense model writes."""
    paths = [path for path in held_out.values() if path != "self"]
    record = pruned.parent / "eval.json"
    words = " ".join(f"--text {path}" for path in paths) + " --seq-len 256 --max-windows 16"
    # Kernels of CPUs round activations, too; what is measured after recovery does not.
    words += " --backend dense"
    gblm(f"eval {pruned} --baseline {model} {words} --output {record}")
    read = Record.read(record)
    side = next(name for name in read.sides if name != read.baseline)
    return {
        Path(path).name: {
            "kl": read.value(side, text, "kl_mean"), "top1": read.value(side, text, "top1"),
            "perplexity": read.value(side, text, "perplexity"),
            "perplexity_dense": read.value(read.baseline or "", text, "perplexity"),
        }
        for path, text in zip(paths, read.loads, strict=True)
    }  # fmt: skip


def gblm(arguments: str) -> tuple[dict[str, Any], float]:
    """Run a command with one thread; gives what it says and the seconds of CPU it took."""
    began = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = pages.alone("-m", "gblm", "--json", "--no-progress", *arguments.split())
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return found, round(ended.ru_utime + ended.ru_stime - began.ru_utime - began.ru_stime, 1)


def add(path: Path, sides: dict[str, Any], rows: list[Row]) -> None:
    """Put a run into the record; a row that is there gets another round, but not the dense one.

    What its other seeds took, and where they ran, stands in `seeds` beside what the first did.
    """
    old = Record.read(path) if path.exists() else Record("recovery", {}, (), DENSE)
    found = {(row.side, row.load, row.metric): row for row in old.rows}
    for row in rows:
        key = (row.side, row.load, row.metric)
        if key in found and row.side == DENSE:
            continue
        rounds = (*(found[key].rounds if key in found else ()), *row.rounds)
        found[key] = Row.of_rounds(row.side, row.load, row.metric, row.unit, rounds)
    for side in (sides.keys() & old.sides.keys()) - {DENSE}:
        facts = old.sides[side]
        sides[side] = facts | {"seeds": [*facts.get("seeds", ()), sides[side]]}
    grown = replace(
        old, sides=old.sides | sides, rows=tuple(found.values()),
        provenance=provenance(), command=pages.made_by(),
    )  # fmt: skip
    pages.save(grown, path)


def table() -> str:
    """Give a table of each model: KL and perplexity before and after, by text."""
    return "\n\n".join(_table(model, record) for model, record in _records())


def plain() -> str:
    """Give a table of each model: what methods cost by pattern and value type, without training."""
    tables = [_plain(model, record) for model, record in _records()]
    return "\n\n".join(filter(None, tables))


def _records() -> list[tuple[str, Record]]:
    return [(m, Record.read(record_of(m))) for m in MODELS if record_of(m).exists()]


def _plain(model: str, record: Record) -> str:
    text, rows, sides = record.loads[0], [], []
    shown = [pattern for pattern in SPARSE if _plain_names([pattern]) & record.sides.keys()]
    for values, method in itertools.product(VALUES, METHODS):
        names = [side_name(pattern, values, method=method) for pattern in shown]
        found = [name for name in names if name in record.sides]
        if found:
            seconds = statistics.median(seed["cpu_seconds"] for seed in made(record, found))
            cells = [_cell(record, name, text) for name in names]
            rows.append([f"{values}, {method}", *cells, f"{seconds / 60:.1f}"])
            sides += found
    if not rows:
        return ""
    header = [f"{pages.MODELS[model]}, {text}", *shown, "CPU minutes"]
    where = pages.origins(made(record, sides), "torch")
    return f"{pages.table(header, rows)}\n\n{where}"


def _plain_names(patterns: Iterable[str]) -> set[str]:
    each = itertools.product(patterns, VALUES, METHODS)
    return {side_name(pattern, values, method=method) for pattern, values, method in each}


def _table(model: str, record: Record) -> str:
    # What the dense model writes is another text in other versions, and is no column.
    texts = [text for text in record.loads if text != "self"]
    rows = []
    for side, facts in _shown(record).items():
        cells = [_cell(record, side, text) for text in texts]
        took = [seed["cpu_seconds"] for seed in made(record, [side])]
        minutes = [f"{statistics.median(took) / 60:.0f}", f"{len(took)}"] if took else ["–", "–"]
        numbers = f"{facts['bits_per_weight']:.2f}", f"{facts['bytes'] / 1e6:.0f}"
        rows.append([side, *numbers, *cells, *minutes])
    header = [pages.MODELS[model], "bits/weight", "MB", *texts, "CPU minutes", "seeds"]
    where = pages.origins(made(record, _shown(record)), "torch")
    return (
        f"{pages.table(header, rows)}\n\nPerplexity · KL to the dense model in nats; 16 windows of "
        f"256 tokens of each text, which no step has seen; {seeds(record, _shown(record))}. "
        f"*descriptions* are those of scikit-learn's data sets. {where}"
    )


def seeds(record: Record, sides: Container[str]) -> str:
    """Say of how many seeds rows are medians, and how far apart the perplexities of one lie."""
    # What the dense model writes is another text with each seed.
    rows = [r for r in record.rows if r.metric == "perplexity" and r.load != "self"]
    found = [row.rounds for row in rows if row.side in sides and row.side != DENSE]
    numbers = {len(rounds) for rounds in found}
    if numbers == {1}:
        return "one seed"
    apart = max(max(rounds) / min(rounds) - 1 for rounds in found)
    of = "up to " * (len(numbers) > 1) + str(max(numbers))
    return f"medians of {of} seeds, which lie up to {100 * apart:.1f} % apart"


def _shown(record: Record) -> dict[str, Any]:
    """Give the sides that are not in `plain`, the largest first."""
    hidden = _plain_names(SPARSE)
    found = {side: facts for side, facts in record.sides.items() if side not in hidden}
    return dict(sorted(found.items(), key=lambda item: -item[1]["bytes"]))


def made(record: Record, sides: Iterable[str]) -> list[Mapping[str, Any]]:
    """Give the facts of each seed of some rows; the dense model's come with every other one."""
    every = (record.sides[side] for side in sides if side != DENSE)
    return [seed for facts in every for seed in (facts, *facts.get("seeds", ()))]


def _cell(record: Record, side: str, text: str) -> str:
    perplexity, kl = (record.value(side, text, metric) for metric in ("perplexity", "kl"))
    if perplexity is None:
        return "–"
    return pages.perplexity(perplexity) + (f" · {kl:.2f}" if kl is not None else "")


def draw(frontier: Any, curves: Any) -> None:
    """Draw what SmolLM2's rows lose for their bits, and their recoveries over tokens."""
    record = Record.read(record_of(MODELS[0]))
    text = next(iter(record.loads))
    for side, facts in _shown(record).items():
        label, _, recovered = side.partition(", recovered")
        if recovered:
            curves.plot(*_curve(facts["losses"]), label=label)
        if side != DENSE:
            color, marker = "C1" if " dense, GPTQ" in side else "C0", "o" if recovered else "x"
            point = facts["bytes"] / 1e6, record.value(side, text, "kl")
            frontier.plot(*point, color=color, marker=marker)
    curves.set(xlabel="tokens", ylabel="KL to the dense model, nats, on the text of training")
    curves.legend(fontsize="x-small")
    frontier.set(xlabel="MB", ylabel=f"KL to the dense model, nats, on {text}")
    frontier.set_title("dense orange, sparse blue; recovered ●, not yet ×", fontsize="small")


def _curve(losses: list[float]) -> tuple[list[float], list[float]]:
    """Give tokens and mean losses of sixteen parts of a training."""
    window = max(1, len(losses) // 16)
    means = [statistics.fmean(losses[i : i + window]) for i in range(0, len(losses), window)]
    return [1024 * window * (i + 0.5) for i in range(len(means))], means


def main() -> None:
    """Measure the cells and add them to the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default=MODELS[0])
    parser.add_argument("--cells", nargs="+", default=CELLS)
    parser.add_argument("--methods", nargs="+", default=("alps",))
    parser.add_argument("--preset", choices=("fast", "recovered"), default="recovered")
    parser.add_argument("--dense-ends", type=int)
    parser.add_argument("--shrinkage", type=float)
    parser.add_argument("--head", choices=("float", "int8", "int4"))
    parser.add_argument("--tokens", nargs="+", type=int, default=(65536,))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--wikitext", type=Path)
    given = parser.parse_args()
    model = model_folder(Path(tempfile.gettempdir()) / "gblm-shapes", given.model)
    for cell in given.cells:
        for method in given.methods:
            with tempfile.TemporaryDirectory() as work:
                if cell.startswith("keep"):
                    found = remove(model, cell, given, Path(work))
                else:
                    found = measure(model, cell, method, given, Path(work))
            add(record_of(given.model), *found)


if __name__ == "__main__":
    main()
