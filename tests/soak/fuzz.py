"""Thousands of damaged packed folders: each is refused in one sentence or loads what it says.

    python tests/soak/fuzz.py [--cases 10000] [--first 0] [--seed 0]

No engine is started. Every case is one mutation of a folder of a format and value type, given to
`gblm.packed.load` and the check of `gblm inspect --verify`. A loaded model's weights must be those
that a plain loop reads from the files, and its linears must multiply with exactly them. Anything
else is found: another exception, memory beyond the bound, and, which ends the run, a crash or more
than a minute.
Prints one JSON object of counts; the exit code is 1 when something was found. A case depends on
seed and number alone: --first repeats it.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import hashlib
import json
import logging
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from random_damage import Files, mutate
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, OlmoeConfig, PreTrainedConfig
from transformers import logging as transformers_logging

import gblm.packed
from gblm.checkpoint.inspect import verify
from gblm.errors import GblmError, InputError
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import MANIFEST_FILE, PackedReader
from gblm.prune import prune
from gblm.recipe import Recipe

PATTERNS, KINDS = ("2:4", "1:4", "8:16", "0.5", "dense"), ("float", "int8", "int4", "int3")
SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64, "tie_word_embeddings": False,
}  # fmt: skip
CASE_SECONDS = 60
# Address space that a case may take beyond what the process has; the folders hold some 100 KB.
MORE_BYTES = 1 << 30
TOKENS = torch.arange(4).reshape(1, -1)


class FoundError(Exception):
    """A folder that was neither refused in a sentence nor loaded as it is."""


def base_folders(root: Path) -> list[Files]:
    """Make the intact folders: those of a dense model, and those of a mixture of experts."""
    mixture = SIZES | {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1}
    models = LlamaConfig(**SIZES), OlmoeConfig(**mixture)
    return [files for config in models for files in folders_of(config, root / config.model_type)]


def folders_of(config: PreTrainedConfig, root: Path) -> list[Files]:
    """Prune a model to every format with every value type; some folders have two shards."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).bfloat16().save_pretrained(root / "dense")
    found = []
    for pattern in PATTERNS:
        for values in KINDS:
            if values == ("float" if pattern == "dense" else "int3"):
                continue
            out = root / f"{pattern.replace(':', 'of')}-{values}"
            recipe = Recipe(
                model=str(root / "dense"), method="magnitude", pattern=pattern, values=values,
                calibration=None, head="int8" if values == "int8" else "float",
            )  # fmt: skip
            prune(recipe, out)
            if values in ("float", "int4"):
                shard(out)
            found.append({path.name: path.read_bytes() for path in out.iterdir()})
    return found


def shard(folder: Path) -> None:
    """Write a folder's tensors as two shards with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"part-{number % 2}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in sorted(set(files.values())):
        own = {name: tensor for name, tensor in tensors.items() if files[name] == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / MANIFEST_FILE).write_bytes(
        rehashed({path.name: path.read_bytes() for path in folder.iterdir()})[MANIFEST_FILE]
    )


def rehashed(files: Files) -> Files:
    """The files, with MANIFEST.json made to fit, as a careful attacker would."""
    listed = {
        name: {"sha256": hashlib.sha256(blob).hexdigest(), "size": len(blob)}
        for name, blob in files.items()
        if name != MANIFEST_FILE
    }
    return files | {MANIFEST_FILE: json.dumps({"files": listed}).encode()}


def run_case(good: Files, rng: random.Random, folder: Path) -> tuple[str, str]:
    """Damage, write, load, verify one folder.

    Returns:
        What was done to it, and "refused", "loaded unchanged" or "loaded as stored".

    Raises:
        FoundError: something else came of it.
    """
    files = dict(good)
    damage = mutate(rng, files)
    careful = rng.random() < 0.7
    write(folder, rehashed(files) if careful else files)
    # Both roads begin so.
    refusal = attempt(lambda: gblm.packed.check_loadable(ModelFolder.open(folder)))
    not_verified = refusal or attempt(lambda: verify(ModelFolder.open(folder)))
    refusal = refusal or attempt(lambda: check_loaded(folder))
    if refusal:
        # transformers wants things besides, such as an index's metadata.
        if not not_verified and "by transformers" not in refusal:
            raise FoundError(f"{damage}: verified, but not loaded: {refusal}")
        return damage, "refused"
    listed, intact = (
        {name: blob for name, blob in of.items() if name != MANIFEST_FILE} for of in (files, good)
    )
    if not_verified and files == good:
        raise FoundError(f"{damage}: unchanged, but not verified: {not_verified}")
    if not not_verified and not careful and listed != intact:
        raise FoundError(f"{damage}: changed, but verified by its old hashes")
    return damage, "loaded unchanged" if listed == intact else "loaded as stored"


def attempt(action: Callable[[], object]) -> str:
    """The sentence in which an action refuses; nothing when it does not."""
    try:
        action()
    except InputError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError) or "allocate" in str(cause):
                raise FoundError(f"memory beyond the bound: {error}") from error
            cause = cause.__cause__
        return str(error) or "no sentence"
    except GblmError as error:
        raise FoundError(f"blamed on something else: {error!r}") from error
    return ""


def check_loaded(folder: Path) -> None:
    """Load the model and hold every weight against a plain reading of the files."""
    model = gblm.packed.load(folder)
    with PackedReader(ModelFolder.open(folder)) as packed, torch.inference_mode():
        for name, linear in packed.linears.items():
            module = model.get_submodule(name)
            weight = plain_weight(linear.fmt, packed.parts(name), linear.shape)
            check_product(name, module, weight)
        model(TOKENS)


def check_product(name: str, module: Any, weight: torch.Tensor) -> None:
    """A loaded linear multiplies with this weight [out, in], float32."""
    bias = module.bias
    dtype = torch.bfloat16 if bias is None else bias.dtype
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    out = module(x).float()
    if not bool(weight.isfinite().all()) or float(weight.abs().max()) > 1e30:
        return
    want = x.float() @ weight.T + (0 if bias is None else bias.float())
    # Codes meet activations that are rounded to int8.
    bound = 0.03 * float(x.abs().max()) * weight.abs().sum(dim=1) + 1e-6
    if not bool(((out - want).abs() <= bound).all()):
        raise FoundError(f"{name}: does not multiply with the weight that is stored")


def plain_weight(fmt: Any, parts: dict[str, torch.Tensor], shape: tuple[int, int]) -> torch.Tensor:
    """The dense weight [out, in] float32, read position by position."""
    floats, lists = fmt.values.is_float, {name: part.tolist() for name, part in parts.items()}
    values, begin, dense = lists["values"], 0, []
    for row in range(shape[0]):
        kept = [column for column in range(shape[1]) if is_kept(lists, row, column)]
        own = values if "row_offsets" in lists else values[row]
        if "row_offsets" in lists:
            size = (len(kept) + 1) // 2 if fmt.values.in_nibbles else len(kept)
            own, begin = values[begin : begin + size], begin + size
        stored = codes_of(own, fmt.values.bits) if fmt.values.bits < 8 else own
        found = dict(zip(kept, stored, strict=False))
        line = [0.0] * shape[1]
        for column in kept:
            code = found[column]
            line[column] = code if floats else scaled(fmt, lists, code, row, column, shape[1])
        dense.append(line)
    return torch.tensor(dense)


def is_kept(lists: dict[str, Any], row: int, column: int) -> bool:
    """Whether a position is kept."""
    return "bitmask" not in lists or bool(lists["bitmask"][row][column // 8] >> column % 8 & 1)


def codes_of(stored: list[int], bits: int) -> list[int]:
    """Codes of few bits, of bytes that hold them one after the other, the lowest bits first."""
    whole = sum(byte << 8 * place for place, byte in enumerate(stored))
    codes = [whole >> at & (1 << bits) - 1 for at in range(0, 8 * len(stored) - bits + 1, bits)]
    return [code - (1 << bits) if code >> bits - 1 else code for code in codes]


def scaled(
    fmt: Any, lists: dict[str, Any], code: int, row: int, column: int, columns: int
) -> float:
    """What a code stands for."""
    group = column // fmt.values.group(columns)
    scale: float = lists["scales"][row][group]
    return code * scale


def write(folder: Path, files: Files) -> None:
    """Make a folder of exactly these files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, blob in files.items():
        (folder / name).write_bytes(blob)


def run(cases: int, first: int, seed: int) -> dict[str, Any]:
    """Run cases in this process; counts of how they ended."""
    began, found = time.monotonic(), list[str]()
    ends, kinds = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as work:
        goods = base_folders(Path(work) / "base")
        folder = Path(work) / "case"
        for good in goods:
            write(folder, good)
            verify(ModelFolder.open(folder))
            check_loaded(folder)
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES, resource.RLIM_INFINITY))
        for number in range(first, first + cases):
            faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
            rng = random.Random(f"{seed} {number}")
            try:
                damage, end = run_case(rng.choice(goods), rng, folder)
            except Exception as error:
                traceback.print_exc()
                found.append(f"case {number}: {error!r}"[:500])
                continue
            ends[end] += 1
            kinds[damage.partition("+")[0]] += 1
        faulthandler.cancel_dump_traceback_later()
    return {
        "cases": cases,
        "first": first,
        "seed": seed,
        "folders": len(goods),
        **{end: ends[end] for end in ("refused", "loaded unchanged", "loaded as stored")},
        "first_mutation": dict(sorted(kinds.items())),
        "seconds": round(time.monotonic() - began, 1),
        "found": found,
    }


def main() -> None:
    """Print the counts, or end with code 1 and a traceback."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    with contextlib.redirect_stdout(sys.stderr):
        found = run(chosen.cases, chosen.first, chosen.seed)
    print(json.dumps(found))
    sys.exit(1 if found["found"] else 0)


if __name__ == "__main__":
    main()
