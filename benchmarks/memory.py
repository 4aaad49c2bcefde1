"""What `gblm prune --dry-run` says against what the run then shows, for three sizes of model.

    python benchmarks/memory.py [--sizes smollm2 tinyllama llama2] [--methods …] [--append]
        [--folder DIR] [--keep]

SmolLM2-135M is real; the others are LLaMA shapes with random bf16 weights, made once in the
folder, which takes 14 GB for llama2 and up to 41 GB more during its gblm run. Each prediction is
made immediately before its run, both with two threads in processes of their own; memory is the
run's ru_maxrss, disk the most that its output and work folder hold. Writes
benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pages import made_by
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from gblm.fetch import fetch
from gblm.model.folder import ModelFolder
from gblm.model.loading import skeleton
from gblm.provenance import provenance

RECORD = Path(__file__).resolve().parent / "results" / "memory.json"
METHODS = ("wanda", "gblm", "sparsegpt")
# Hidden, intermediate, layers, heads, heads of keys and values.
SHAPES = {
    "tinyllama": (2048, 5632, 22, 32, 4),
    "llama2": (4096, 11008, 32, 32, 32),
}
SIZES = ("smollm2", *SHAPES)
TEXT = {"smollm2": (16, 256), "tinyllama": (4, 128), "llama2": (4, 128)}  # samples, tokens
VOCAB, SCALE = 32000, 0.02
BOS, EOS = "<s>", "</s>"
# Threads that wait by spinning stand still when they share two cores with other work.
THREADS = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"}
POLL_SECONDS = 0.1


def shape_folder(root: Path, size: str) -> Path:
    """A LLaMA of this shape with random weights, one shard per decoder layer."""
    folder = root / size
    if (folder / "model.safetensors.index.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    hidden, wide, layers, heads, kv_heads = SHAPES[size]
    LlamaConfig(
        hidden_size=hidden, intermediate_size=wide, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, vocab_size=VOCAB,
        max_position_embeddings=4096, tie_word_embeddings=False, bos_token_id=256,
        eos_token_id=257, architectures=["LlamaForCausalLM"], dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    save_byte_tokenizer(folder)
    weight_map = dict(write_shards(folder))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_shards(folder: Path) -> Iterator[tuple[str, str]]:
    """Draw and write shard after shard; yield each tensor's name and file."""
    shards: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in skeleton(ModelFolder.open(folder), 10**6).named_parameters():
        parts = name.split(".")
        shard = parts[2] if parts[1] == "layers" else "frame"
        shards.setdefault(shard, {})[name] = parameter.shape
    for seed, (shard, shapes) in enumerate(shards.items()):
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            name: (torch.randn(shape, generator=generator) * SCALE).bfloat16()
            if len(shape) > 1
            else torch.ones(shape, dtype=torch.bfloat16)
            for name, shape in shapes.items()
        }
        file = f"model-{shard}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        yield from ((name, file) for name in tensors)


def save_byte_tokenizer(folder: Path) -> None:
    """256 bytes, BOS 256, EOS 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS
    ).save_pretrained(folder)


def measure(root: Path, size: str, method: str) -> dict[str, Any]:
    """One row of the record: predict, run, compare."""
    model = fetch(size) if size == "smollm2" else shape_folder(root, size)
    samples, tokens = TEXT[size]
    words = [
        str(model), "--method", method, "--pattern", "2:4", "--calibration", "pydoc",
        "--num-samples", str(samples), "--seq-len", str(tokens), "--json",
    ]  # fmt: skip
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=root, prefix="run-") as folder:
        words += ["--output", f"{folder}/out"]
        said = gblm("prune", *words, "--dry-run")
        report, measured = watch(Path(folder), "prune", *words)
    predicted = {
        "peak_rss_bytes": said["memory_bytes"],
        "disk_peak_bytes": said["disk_bytes"],
        "output_bytes": said["bytes_packed"],
        "seconds": said["seconds"],
    }
    ratio = {key: round(measured[key] / value, 3) for key, value in predicted.items()}
    return {
        "size": size,
        "method": method,
        "samples": samples,
        "seq_len": tokens,
        "predicted": predicted,
        "measured": measured,
        "measured_to_predicted": ratio,
        "bits_per_weight": report["bits_per_weight"],
        "load_average_at_start": round(load, 1),
        "provenance": provenance(),
        "dry_run": said,
    }


def gblm(*words: str) -> dict[str, Any]:
    """Run a command and give its JSON."""
    command = [sys.executable, "-m", "gblm", *words]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, env=os.environ | THREADS)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def watch(folder: Path, *words: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run a command; its JSON, and memory, disk and time as the system saw them."""
    began, peak = time.monotonic(), 0
    with (folder / "report.json").open("wb") as stdout:
        process = subprocess.Popen(
            [sys.executable, "-m", "gblm", *words], stdout=stdout, env=os.environ | THREADS
        )
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            peak = max(peak, used(folder))
            time.sleep(POLL_SECONDS)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"gblm {' '.join(words)} failed: exit {process.returncode}")
    return json.loads((folder / "report.json").read_text()), {
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "disk_peak_bytes": peak,
        "output_bytes": used(folder / "out"),
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
    }


def used(folder: Path) -> int:
    """Bytes of the files below a folder; files may vanish meanwhile."""
    total = 0
    for path, _, files in os.walk(folder):
        for file in files:
            try:
                total += (Path(path) / file).stat().st_size
            except FileNotFoundError:
                continue
    return total


def save(row: dict[str, Any], append: bool) -> None:
    """Put a row into the record, in the place of an older one of the same run."""
    rows = json.loads(RECORD.read_text())["rows"] if append and RECORD.exists() else []
    rows = [r for r in rows if (r["size"], r["method"]) != (row["size"], row["method"])] + [row]
    rows.sort(key=lambda r: (SIZES.index(r["size"]), METHODS.index(r["method"])))
    record = {
        "kind": "plan",
        "command": made_by(),
        "provenance": provenance(),
        "threads": THREADS,
        "rows": rows,
    }
    RECORD.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Measure what is asked for; each row is on disk as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--append", action="store_true", help="keep the other rows of the record")
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir()) / "gblm-shapes",
        help="for models and runs",
    )  # fmt: skip
    parser.add_argument("--keep", action="store_true", help="keep the models that were made")
    chosen = parser.parse_args()
    chosen.folder.mkdir(parents=True, exist_ok=True)
    append = chosen.append
    for size in chosen.sizes:
        for method in chosen.methods:
            row = measure(chosen.folder, size, method)
            save(row, append)
            append = True
            print(size, method, row["measured_to_predicted"], row["measured"], flush=True)
        if not chosen.keep:
            shutil.rmtree(chosen.folder / size, ignore_errors=True)


if __name__ == "__main__":
    main()
