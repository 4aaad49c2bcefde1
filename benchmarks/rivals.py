"""Rivals on SmolLM2-135M, unpruned: llama.cpp and ONNX Runtime.

    python benchmarks/rivals.py [--wikitext test.txt]

Needs what benchmarks/rivals/ lists. What calibrates does so on the text of `gblm prune`, and texts
and windows are those of recovery.py, whose rows stand beside. llama.cpp's Q8_0 and Q4_0 have every
matrix of one type, the embeddings, which are the head, too; with an importance matrix files are as
its own quantiser mixes them. ONNX Runtime's graphs are those of `gblm export onnx`. Writes
benchmarks/results/rivals.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import tempfile
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import llama_cpp_files
import pages
import recovery
from pages import gblm

from gblm.calibrate.text import draw
from gblm.evaluate.perplexity import Protocol
from gblm.fetch import fetch
from gblm.model.loading import load_tokenizer
from gblm.recipe import MIX, Calibration
from gblm.record import Record, Row

RECORD = pages.RESULTS / "rivals.json"
PURE = ("Q8_0", "Q4_0")
MIXED = ("Q4_0", "Q4_K_M")
ONNX = ("fp32", "int8", "int4")
# Words in the rows of recovery.py that stand beside: what it makes of the model in the end.
OURS = ("int8 dense", "int4:32 dense", "recovered")
# Name, bytes, and perplexity by text.
Found = Iterator[tuple[str, int, dict[str, float]]]


def llama_cpp(model: Path, texts: Mapping[str, str], root: Path) -> Found:
    """Measure each GGUF type; files are made in root, `texts` are held out, by column."""
    tokenizer = load_tokenizer(model)
    windows = {
        name: Protocol(text, 256, max_windows=16).windows(tokenizer).tolist()
        for name, text in texts.items()
    }

    def measured(name: str, path: Path) -> tuple[str, int, dict[str, float]]:
        losses = {text: llama_cpp_files.mean_loss(path, own) for text, own in windows.items()}
        return name, path.stat().st_size, {text: math.exp(x) for text, x in losses.items()}

    for kind in PURE:
        path = llama_cpp_files.make_gguf(model, kind, root / kind)
        yield measured(f"llama.cpp {kind}", path)
    source = llama_cpp_files.make_gguf(model, "BF16", root / "BF16")
    text = Calibration(source=MIX, num_samples=64, seq_len=512)
    calibration = draw(text, model, tokenizer)
    squares = llama_cpp_files.importance(model, calibration)
    for kind in MIXED:
        path = llama_cpp_files.quantise(source, kind, root / f"{kind}-imatrix", squares)
        yield measured(f"llama.cpp {kind}, importance matrix", path)


def onnx(model: Path, texts: Mapping[str, str], root: Path) -> Found:
    """Measure the graphs without an operator of ours."""
    for precision in ONNX:
        folder, record, found = root / precision, root / "eval.json", {}
        gblm(f"export onnx '{model}' --precision {precision} --validate 0 --output '{folder}'")
        for name, text in texts.items():
            how = f"--text '{text}' --seq-len 256 --max-windows 16 --no-baseline"
            gblm(f"eval '{folder}' {how} --output '{record}'")
            found[name] = Record.read(record).rows[0].value or math.inf
        size = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
        yield f"ONNX Runtime {precision}", size, found


def table() -> str:
    """Put size and perplexities of ours, dense and recovered, beside what others make."""
    rivals, ours = Record.read(RECORD), Record.read(recovery.record_of("smollm2"))
    texts = rivals.loads
    # What is stored as int4 and counted as three bits is no file of ours.
    # Rows of older recipes, which did not shrink, are no rivals either.
    made = [side for side in ours.sides if not side.startswith(tuple(recovery.LIMITS))]
    made = [side for side in made if ", not shrunk" not in side]
    picked = [side for side in made if side == recovery.DENSE or any(map(side.count, OURS))]
    rows = [(rivals.sides[side]["bytes"], rivals, side) for side in rivals.sides]
    rows += [(ours.sides[side]["bytes"], ours, side) for side in picked]
    shown = [
        [
            side if record is rivals or side == recovery.DENSE else f"gblm {side}",
            f"{size / 1e6:.0f}",
            *(pages.perplexity(record.value(side, text, "perplexity") or 0) for text in texts),
        ]
        for size, record, side in sorted(rows, key=lambda row: -row[0])
    ]
    return (
        f"{pages.table(['SmolLM2-135M', 'MB', *texts], shown)}\n\nPerplexity, 16 windows of 256 "
        "tokens of each text, which no step has seen; each in its own engine's arithmetic, ours in "
        "PyTorch's. "
        "llama-cpp-python "
        f"{rivals.provenance['llama_cpp']}, onnxruntime "
        f"{rivals.provenance['packages']['onnxruntime']}. "
        f"{pages.origins([rivals.as_json(), *recovery.made(ours, picked)], 'torch')}"
    )


def main() -> None:
    """Make the files, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wikitext", type=Path)
    given = parser.parse_args()
    sides, rows = {}, []
    with tempfile.TemporaryDirectory() as work:
        texts = recovery.texts(given, Path(work))
        del texts["self"]  # which is no held-out text of a rival
        where = fetch("smollm2"), texts, Path(work)
        for name, size, perplexities in chain(llama_cpp(*where), onnx(*where)):
            sides[name] = {"bytes": size}
            rows += [Row(name, t, "perplexity", "", v) for t, v in perplexities.items()]
    record = Record("rivals", sides, tuple(rows), command=pages.made_by())
    facts = {"llama_cpp": importlib.metadata.version("llama-cpp-python"), "model": "smollm2"}
    record.provenance.update(facts)
    pages.save(record, RECORD)


if __name__ == "__main__":
    main()
