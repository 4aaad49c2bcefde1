"""Named damage to a packed folder, each the work of someone who knows the format."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gblm.files import sha256

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.0.mlp.up_proj"
NORM, BITS = "model.norm.weight", f"{UP}.bitmask"
Damage = Callable[[Path], None]
# Arguments of the fixture pack_tiny: pattern and values.
NM, NM8, ANY4 = ("2:4", "float"), ("2:4", "int8"), ("0.5", "int4")
HALVED = ("8:16", "float")


def rehash(folder: Path) -> None:
    """Make MANIFEST.json fit again, so that no reader can lean on it."""
    listed = {
        path.name: {"sha256": sha256(path), "size": path.stat().st_size}
        for path in folder.iterdir()
        if path.name != "MANIFEST.json" and path.is_file()
    }
    (folder / "MANIFEST.json").write_text(json.dumps({"files": listed}))


def damaged(source: Path, target: Path, *damages: Damage) -> Path:
    """Copy a folder and damage the copy, whose hashes fit if it has any."""
    shutil.copytree(source, target)
    for damage in damages:
        damage(target)
    if (target / "MANIFEST.json").exists():
        rehash(target)
    return target


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Damage:
    """Other tensors in an intact file."""

    def damage(folder: Path) -> None:
        found = {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}
        change(found)
        save_file(found, folder / SINGLE, metadata={"format": "pt"})

    return damage


def part(name: str, change: Callable[[torch.Tensor], object]) -> Damage:
    """Other numbers in one part of UP."""
    return tensors(lambda found: change(found[f"{UP}.{name}"]))


def header(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Another header before the same data."""

    def damage(folder: Path) -> None:
        blob = (folder / SINGLE).read_bytes()
        (length,) = struct.unpack("<Q", blob[:8])
        found = json.loads(blob[8 : 8 + length])
        text = change(found)
        text = text if isinstance(text, bytes) else json.dumps(found).encode()
        (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + blob[8 + length :])

    return damage


def entry(key: str, value: object, name: str = f"{UP}.values") -> Damage:
    """One field of one tensor in the header."""
    return header(lambda found: found[name].update({key: value}) and None)


def data(change: Callable[[bytes], bytes], file: str = SINGLE) -> Damage:
    """Other bytes of a file."""
    return lambda folder: (folder / file).write_bytes(change((folder / file).read_bytes())) and None


def flip(file: str = SINGLE, place: int = -1) -> Damage:
    """Flip one bit of a byte, counted from the end."""
    return data(lambda b: b[:place] + bytes([b[place] ^ 1]) + b[len(b) + place + 1 :], file)


def config(change: Callable[[dict[str, Any]], object]) -> Damage:
    """Another config.json; what `change` returns as bytes is written as it is."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text())
        text = change(found)
        text = text if isinstance(text, bytes) else json.dumps(found).encode()
        (folder / "config.json").write_bytes(text)

    return damage


def group(**fields: object) -> Damage:
    """Other words in the manifest's first group."""
    return config(lambda found: found["quantization_config"]["groups"][0].update(fields) and None)


def sharded(change: Callable[[Path, dict[str, str]], object]) -> Damage:
    """Two shards with an index that `change` may turn into another one."""

    def damage(folder: Path) -> None:
        found = load_file(folder / SINGLE)
        (folder / SINGLE).unlink()
        files = {name: f"part-{int(name.startswith(UP))}.safetensors" for name in found}
        for file in set(files.values()):
            own = {name: tensor for name, tensor in found.items() if files[name] == file}
            save_file(own, folder / file, metadata={"format": "pt"})
        text = change(folder, files)
        text = text if isinstance(text, str) else json.dumps({"metadata": {}, "weight_map": files})
        (folder / INDEX).write_text(text)

    return damage


def _hidden(folder: Path, _: dict[str, str]) -> None:
    shard = load_file(folder / "part-1.safetensors")
    save_file(shard | {NORM: torch.zeros(64)}, folder / "part-1.safetensors", {"format": "pt"})


def _outside(folder: Path) -> None:
    other = folder.parent / "other.safetensors"
    (folder / SINGLE).rename(other)
    (folder / SINGLE).symlink_to(other)


def _pipe(folder: Path) -> None:
    import os

    (folder / SINGLE).unlink()
    os.mkfifo(folder / SINGLE)


def _twice(found: dict[str, Any]) -> bytes:
    name = f"{UP}.values"
    return f'{{"{name}": {json.dumps(found[NORM])}, {json.dumps(found)[1:]}'.encode()


def _overlap(found: dict[str, Any]) -> None:
    found[f"{UP}.values"]["data_offsets"] = [o - 2 for o in found[f"{UP}.values"]["data_offsets"]]


def _set(
    index: tuple[int | slice, ...], value: float | torch.Tensor
) -> Callable[[torch.Tensor], None]:
    return lambda tensor: tensor.__setitem__(index, value)


# Name → pattern and values of the folder, what is done to it, and words of the refusal.
DAMAGES: dict[str, tuple[tuple[str, str], Damage, str]] = {
    # Headers of safetensors.
    "header longer than the file": (NM, data(lambda b: struct.pack("<Q", 2**40) + b[8:]), "intact"),
    "header of 2^64 − 1 bytes": (NM, data(lambda b: b"\xff" * 8 + b[8:]), "intact"),
    "header that is no JSON": (NM, header(lambda _: b"[1, 2"), "intact"),
    "header nested 10,000 deep": (NM, header(lambda _: b'{"a":' * 10_000), "intact"),
    "file cut in the data": (NM, data(lambda b: b[:-100]), "intact"),
    "file cut in the header": (NM, data(lambda b: b[:100]), "intact"),
    "bytes behind the data": (NM, data(lambda b: b + b"\0" * 64), "intact"),
    "shape whose product overflows": (NM, entry("shape", [2**33, 2**33]), "intact"),
    "huge declared shape": (NM, entry("shape", [2**31, 32]), "intact"),
    "negative shape": (NM, entry("shape", [-128, 32]), "intact"),
    "overlapping offsets": (NM, header(_overlap), "intact"),
    "offsets the wrong way round": (NM, entry("data_offsets", [64, 0]), "intact"),
    "offsets beyond the data": (NM, entry("data_offsets", [0, 2**62]), "intact"),
    "unknown dtype": (NM, entry("dtype", "EVIL"), "intact"),
    "bitmask of another dtype": (NM, entry("dtype", "I8", f"{UP}.bitmask"), "torch.int8"),
    "values of another dtype": (NM, entry("dtype", "I16"), "floating point"),
    "norm of whole numbers": (NM, entry("dtype", "I16", NORM), "floating point"),
    "norm of another shape": (NM, entry("shape", [8, 8], NORM), r"stored as \[8, 8\]"),
    # Shards, their index, links.
    "shard name outside the folder": (
        NM, sharded(lambda _, files: files.update({NORM: "../x.safetensors"})), "leads out",
    ),
    "link out of the folder": (NM, _outside, "leads out"),
    "pipe instead of a file": (NM, _pipe, "no ordinary file"),
    "tensor in a shard that lacks it": (
        NM, sharded(lambda _, files: files.update({NORM: "part-1.safetensors"})), "missing",
    ),
    "tensor hidden in another shard": (NM, sharded(_hidden), "does not list it"),
    "index with a key twice": (
        NM, sharded(lambda _, files: '{"weight_map": {}, "weight_map": ' + json.dumps(files) + "}"),
        "stands there twice",
    ),
    "shard of no index": (
        NM, lambda f: save_file({"x": torch.ones(1)}, f / "x.safetensors"), "belongs to no index",
    ),
    # Masks and offsets.
    "three of four kept": (NM, part("bitmask", _set((3, 0), 0b01110011)), "row 3"),
    "one of four kept": (NM8, part("bitmask", _set((3, 0), 0b00010011)), "row 3"),
    "six of eight kept in a half": (
        HALVED, part("bitmask", _set((3, slice(2)), torch.tensor([0b00111111, 0b11000000]))),
        "row 3, columns 0..7 keep 6",
    ),
    "more bits than values": (ANY4, part("bitmask", _set((1, 0), 255)), "row 1"),
    "row offsets out of order": (ANY4, part("row_offsets", _set((2,), -5)), "row 1"),
    "row offsets beyond the values": (ANY4, part("row_offsets", _set((-1,), 2**62)), "row_offsets"),
    "row offsets that begin at 1": (ANY4, part("row_offsets", lambda t: t.add_(1)), "run from 1"),
    "bitmask of fewer rows": (
        NM, tensors(lambda t: t.update({BITS: t[BITS][:-1].clone()})), "needs",
    ),
    **{
        f"bitmask of shape {shape}": (
            NM, tensors(lambda t, s=shape: t.update({BITS: torch.zeros(s, dtype=torch.uint8)})),
            "up_proj",
        )
        for shape in ((1024, 16), (128, 17), (128, 0), (2, 2, 2))
    },
    # Values, codes, scales.
    "NaN value": (NM, part("values", _set((2, 1), float("nan"))), "NaN"),
    "infinite value": (NM, part("values", _set((2, 1), float("inf"))), "Inf"),
    "codes without a sign": (
        NM8, tensors(lambda t: t.update({f"{UP}.values": t[f"{UP}.values"].view(torch.uint8)})),
        "needs",
    ),
    "codes of two bytes": (
        ANY4, tensors(lambda t: t.update({f"{UP}.values": t[f"{UP}.values"].short()})), "needs",
    ),
    "NaN scale": (NM8, part("scales", _set((5, 0), float("nan"))), "row 5, group 0 is nan"),
    "infinite scale": (ANY4, part("scales", _set((5, 0), float("inf"))), "is inf"),
    "scale of zero": (ANY4, part("scales", _set((5, 0), 0.0)), r"is 0\.0"),
    "negative scale": (NM8, part("scales", _set((5, 0), -1.0)), r"is -1\.0"),
    "scales of another shape": (
        NM8, tensors(lambda t: t.update({f"{UP}.scales": t[f"{UP}.scales"][:1].clone()})), "needs",
    ),
    # Tensors that are not there, or should not be.
    "missing part": (NM, tensors(lambda t: t.pop(f"{UP}.bitmask")), "'bitmask' of format"),
    "missing norm": (NM, tensors(lambda t: t.pop(NORM)), f"{NORM} is missing"),
    "missing weight": (
        NM, tensors(lambda t: [t.pop(f"{UP}.values"), t.pop(f"{UP}.bitmask")]), "missing",
    ),
    "weight that is stored twice": (
        NM, tensors(lambda t: t.update({f"{UP}.weight": torch.zeros(128, 64)})), "stored dense",
    ),
    "part of another format": (
        NM, tensors(lambda t: t.update({f"{UP}.zeros": torch.zeros(2)})), "no such tensor",
    ),
    "tensor of no module": (
        NM, tensors(lambda t: t.update({"model.evil": torch.zeros(2)})), "no such tensor",
    ),
    # The manifest and config.json.
    "format that names code": (NM, group(format="os:system"), "unknown"),
    "format with a line break": (NM, group(format="nm\n"), "unknown"),
    "pattern of other digits": (NM, group(pattern="٢:٤"), "unknown"),
    "pattern of another width": (NM, group(pattern="1:4"), "needs"),
    "values that are not stored": (NM, group(values="int8:64"), "missing"),
    "group size of 3": (NM8, group(values="int8:3"), "group size 3"),
    "target that is a path": (NM, group(targets=["../../x"]), "no module name"),
    "unknown key in a group": (NM, group(evil=1), "evil"),
    "manifest without groups": (
        NM, config(lambda c: c["quantization_config"].update(groups=[])), "groups",
    ),
    "another version": (
        NM, config(lambda c: c["quantization_config"].update(version=2)), "version 2",
    ),
    "config.json with a key twice": (
        NM, config(lambda c: b'{"hidden_size": 8, ' + json.dumps(c).encode()[1:]), "there twice",
    ),
    "config.json that names code": (
        NM, config(lambda c: c.update(auto_map={"AutoConfig": "evil.Evil"})), "auto_map",
    ),
    "a billion decoder layers": (NM, config(lambda c: c.update(num_hidden_layers=10**9)), "claims"),
    "a width of 2^40": (NM, config(lambda c: c.update(hidden_size=2**40)), "config.json makes it"),
    "fewer decoder layers": (NM, config(lambda c: c.update(num_hidden_layers=1)), "no such module"),
    "a vocabulary of 2^36": (NM, config(lambda c: c.update(vocab_size=2**36)), "stored as"),
}  # fmt: skip
