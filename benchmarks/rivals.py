"""Rivals on SmolLM2-135M, unpruned: llama.cpp, ONNX Runtime, and llm-compressor's folders in vLLM.

    python benchmarks/rivals.py [--llm-compressor ENVIRONMENT/bin/python] [--wikitext test.txt]

Needs what benchmarks/rivals/ lists; vLLM has rows with llm-compressor alone. What calibrates does
so on the text of `gblm prune`, and texts and windows are those of recovery.py, whose rows stand
beside. llama.cpp's Q8_0 and Q4_0 have every matrix of one type, the embeddings, which are the head,
too; with an importance matrix files are as its own quantiser mixes them. ONNX Runtime's graphs are
those of `gblm export onnx`. Writes benchmarks/results/rivals.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import llama_cpp_files
import pages
import recovery
from pages import gblm

from gblm.bench.server import running_server
from gblm.calibrate.text import draw
from gblm.evaluate.perplexity import Protocol
from gblm.fetch import fetch
from gblm.model.loading import load_tokenizer
from gblm.recipe import MIX
from gblm.record import Record, Row

RECORD = pages.RESULTS / "rivals.json"
PURE = ("Q8_0", "Q4_0")
MIXED = ("Q4_0", "Q4_K_M")
ONNX = ("fp32", "int8", "int4")
SCHEMES = ("W8A8", "W4A16")
# Words in the rows of recovery.py that stand beside: what it makes of the model in the end.
OURS = ("int8 dense", "recovered")


class Rivals:
    """Rivals make files of the same model, and each is measured on every text.

    Args:
        model: a dense folder.
        texts: held out, files or names, by the names of their columns.
        root: a folder for what is made.
    """

    def __init__(self, model: Path, texts: Mapping[str, str], root: Path) -> None:
        self.model, self.texts, self.root = model, texts, root
        self.tokenizer = load_tokenizer(model)
        self.calibration = draw(MIX, model, self.tokenizer, 64, 512, seed=0, bos=True)

    def llama_cpp(self) -> Iterator[tuple[str, int, dict[str, float]]]:
        """Give name, bytes and perplexity by text of each GGUF type."""
        source = llama_cpp_files.make_gguf(self.model, "BF16", self.root / "BF16")
        for kind in PURE:
            path = llama_cpp_files.make_gguf(self.model, kind, self.root / kind)
            yield f"llama.cpp {kind}", path.stat().st_size, self._losses(path)
        importance = llama_cpp_files.importance(self.model, self.calibration)
        for kind in MIXED:
            path = self.root / f"{kind}-imatrix"
            llama_cpp_files.quantise(source, kind, path, importance)
            name = f"llama.cpp {kind}, importance matrix"
            yield name, path.stat().st_size, self._losses(path)

    def _losses(self, path: Path) -> dict[str, float]:
        found = {}
        for name, text in self.texts.items():
            windows = Protocol(text, 256, max_windows=16).windows(self.tokenizer).tolist()
            found[name] = math.exp(llama_cpp_files.mean_loss(path, windows))
        return found

    def onnx(self) -> Iterator[tuple[str, int, dict[str, float]]]:
        """Give name, bytes and perplexity of the graphs without an operator of ours."""
        for precision in ONNX:
            folder = self.root / precision
            how = f"--precision {precision} --validate 0"
            gblm(f"export onnx '{self.model}' {how} --output '{folder}'")
            size = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
            yield f"ONNX Runtime {precision}", size, self._evaluated(str(folder))

    def vllm(self, python: Path) -> Iterator[tuple[str, int, dict[str, float]]]:
        """Give name, bytes and perplexity of what llm-compressor makes and vLLM serves.

        Args:
            python: of an environment that has llm-compressor.
        """
        tokens, script = self.root / "tokens.json", Path(__file__).with_name("llm_compressor.py")
        tokens.write_text(json.dumps(self.calibration.tolist()))
        for scheme in SCHEMES:
            folder = self.root / scheme
            subprocess.run([python, script, self.model, tokens, scheme, folder], check=True)
            size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
            with running_server(folder, None, (), self.root / "log") as server:
                yield f"vLLM {scheme}, GPTQ of llm-compressor", size, self._evaluated(server.url)

    def _evaluated(self, side: str) -> dict[str, float]:
        found, record = {}, self.root / "eval.json"
        for name, text in self.texts.items():
            how = f"--text '{text}' --seq-len 256 --max-windows 16 --no-baseline"
            gblm(f"eval '{side}' {how} --output '{record}'")
            found[name] = Record.read(record).rows[0].value or math.inf
        return found


def table() -> str:
    """Put size and perplexities of ours, dense and recovered, beside what others make."""
    rivals, ours = Record.read(RECORD), Record.read(recovery.record_of("smollm2"))
    texts = rivals.loads
    # What is stored as int4 and counted as three bits is no file of ours.
    made = [side for side in ours.sides if not side.startswith(tuple(recovery.LIMITS))]
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
        "tokens of each text, which no step has seen; each in its own engine's arithmetic. "
        "llama-cpp-python "
        f"{rivals.provenance['llama_cpp']}, onnxruntime "
        f"{rivals.provenance['packages']['onnxruntime']}. "
        f"{pages.origins([rivals.as_json(), *recovery.made(ours, picked)], 'torch')}"
    )


def main() -> None:
    """Make the files, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm-compressor", type=Path, metavar="PYTHON")
    parser.add_argument("--wikitext", type=Path)
    given = parser.parse_args()
    sides, rows = {}, []
    with tempfile.TemporaryDirectory() as work:
        texts = recovery.texts(given, Path(work))
        del texts["self"]  # which is no held-out text of a rival
        made = Rivals(fetch("smollm2"), texts, Path(work))
        python = given.llm_compressor
        vllm = made.vllm(python) if python else ()
        for name, size, perplexities in chain(made.llama_cpp(), made.onnx(), vllm):
            sides[name] = {"bytes": size}
            rows += [Row(name, t, "perplexity", "", v) for t, v in perplexities.items()]
    record = Record("rivals", sides, tuple(rows), command=pages.made_by())
    facts = {"llama_cpp": importlib.metadata.version("llama-cpp-python"), "model": "smollm2"}
    record.provenance.update(facts)
    pages.save(record, RECORD)


if __name__ == "__main__":
    main()
