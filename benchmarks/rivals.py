"""Rivals on SmolLM2-135M, unpruned: llama.cpp, ONNX Runtime and llm-compressor's GPTQ.

    python benchmarks/rivals.py [--by llama.cpp onnxruntime llmcompressor] [--wikitext test.txt]

Needs what benchmarks/rivals/ lists, each rival for itself; the others' rows stay. What calibrates
does so on the text of `gblm prune`, and texts and windows are those of recovery.py, whose rows
stand beside. llama.cpp's Q8_0 and Q4_0 have every matrix of one type, the embeddings, which are the
head, too; with an importance matrix files are as its own quantiser mixes them. ONNX Runtime's
graphs are those of `gblm export onnx`. llm-compressor's GPTQ is judged by the weights that it
leaves in PyTorch; head and embeddings of the file that it saves have 16 bits. Writes
benchmarks/results/rivals.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import llama_cpp_files
import pages
import recovery
import torch
from pages import gblm
from torch import Tensor

from gblm.calibrate.text import draw
from gblm.evaluate.perplexity import Protocol, perplexity
from gblm.fetch import fetch
from gblm.model.loading import load_tokenizer
from gblm.provenance import provenance
from gblm.recipe import MIX, Calibration
from gblm.record import Record, Row

RECORD = pages.RESULTS / "rivals.json"
PURE = ("Q8_0", "Q4_0")
MIXED = ("Q4_0", "Q4_K_M")
ONNX = ("fp32", "int8", "int4")
# Bits and columns of a group that llm-compressor rounds to.
CODES = ((4, 96), (4, 32), (3, 96))
TEXT = Calibration(source=MIX, num_samples=128, seq_len=512)
# Words in the rows of recovery.py that stand beside: what it makes of the model in the end.
OURS = ("int8 dense", "recovered")
# Name, bytes, and perplexity by text.
Found = Iterator[tuple[str, int, dict[str, float]]]


def llama_cpp(model: Path, texts: Mapping[str, str], root: Path) -> Found:
    """Measure each GGUF type; files are made in root, `texts` are held out, by column."""
    windows = {name: own.tolist() for name, own in _windows(model, texts).items()}

    def measured(name: str, path: Path) -> tuple[str, int, dict[str, float]]:
        losses = {text: llama_cpp_files.mean_loss(path, own) for text, own in windows.items()}
        return name, path.stat().st_size, {text: math.exp(x) for text, x in losses.items()}

    for kind in PURE:
        path = llama_cpp_files.make_gguf(model, kind, root / kind)
        yield measured(f"llama.cpp {kind}", path)
    source = llama_cpp_files.make_gguf(model, "BF16", root / "BF16")
    squares = llama_cpp_files.importance(model, draw(TEXT, model, load_tokenizer(model)))
    for kind in MIXED:
        path = llama_cpp_files.quantise(source, kind, root / f"{kind}-imatrix", squares)
        yield measured(f"llama.cpp {kind}, importance matrix", path)


def _windows(model: Path, texts: Mapping[str, str]) -> dict[str, Tensor]:
    tokenizer = load_tokenizer(model)
    protocols = {name: Protocol(text, 256, max_windows=16) for name, text in texts.items()}
    return {name: protocol.windows(tokenizer) for name, protocol in protocols.items()}


def llm_compressor(model: Path, texts: Mapping[str, str], root: Path) -> Found:
    """Measure GPTQ, decoder layer after decoder layer, for each kind of codes."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    windows, samples = _windows(model, texts), draw(TEXT, model, load_tokenizer(model))
    seen = torch.ones_like(samples).tolist()
    text = Dataset.from_dict({"input_ids": samples.tolist(), "attention_mask": seen})
    for bits, group in CODES:
        rounded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        codes = QuantizationArgs(
            num_bits=bits, strategy="group", group_size=group, actorder="static"
        )
        scheme = QuantizationScheme(targets=["Linear"], weights=codes)
        oneshot(
            model=rounded, dataset=text, num_calibration_samples=len(samples),
            recipe=GPTQModifier(config_groups={"linears": scheme}, ignore=["lm_head"]),
            max_seq_length=TEXT.seq_len, pipeline="sequential",
        )  # fmt: skip
        found = {name: perplexity(rounded, own) for name, own in windows.items()}
        folder = root / f"int{bits}-{group}"
        rounded.to(torch.bfloat16).save_pretrained(folder, save_compressed=True)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        yield f"llm-compressor int{bits}:{group}, GPTQ", size, found


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


# What measures each, and the package that it needs.
RIVALS = {
    "llama.cpp": (llama_cpp, "llama-cpp-python"),
    "onnxruntime": (onnx, "onnxruntime"),
    "llmcompressor": (llm_compressor, "llmcompressor"),
}


def table() -> str:
    """Put size and perplexities of ours, dense and recovered, beside what others make."""
    rivals, ours = Record.read(RECORD), Record.read(recovery.record_of("smollm2"))
    texts = rivals.loads
    picked = [side for side in ours.sides if side == recovery.DENSE or any(map(side.count, OURS))]
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
        f"PyTorch's. {', '.join(dict.fromkeys(own['by'] for own in rivals.sides.values()))}. "
        f"{pages.origins([*rivals.sides.values(), *recovery.made(ours, picked)], 'torch')}"
    )


def main() -> None:
    """Make the files, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--by", nargs="+", choices=RIVALS, default=list(RIVALS))
    parser.add_argument("--wikitext", type=Path)
    given = parser.parse_args()
    old = Record.read(RECORD)
    sides, rows = dict(old.sides), list(old.rows)
    with tempfile.TemporaryDirectory() as work:
        texts = recovery.texts(given, Path(work))
        del texts["self"]  # which is no held-out text of a rival
        where = fetch("smollm2"), texts, Path(work)
        for measure, package in map(RIVALS.__getitem__, given.by):
            by = f"{package} {importlib.metadata.version(package)}"
            facts = {"by": by, "command": pages.made_by(), "provenance": provenance()}
            for side, size, perplexities in measure(*where):
                sides[side] = {"bytes": size, **facts}
                rows = [row for row in rows if row.side != side]
                rows += [Row(side, t, "perplexity", "", v) for t, v in perplexities.items()]
    made = {"command": pages.made_by(), "provenance": provenance() | {"model": "smollm2"}}
    pages.save(replace(old, sides=sides, rows=tuple(rows), **made), RECORD)


if __name__ == "__main__":
    main()
