"""Seeded damage to a packed folder: bytes, safetensors headers, JSON, and tensors' own data.

A folder is a dict of file name → bytes; a mutation changes it in place. Knows nothing of readers.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from typing import Any

Files = dict[str, bytes]
WEIGHTS, CONFIG, INDEX = ".safetensors", "config.json", ".index.json"
# What a hostile hand would write where a value stands.
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 7, 8, 31, 64, 65, 1023, 2**31 - 1, 2**31, 2**32, 2**53,
    2**63 - 1, 2**63, 2**64, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf"), "", ".", "..",
    "../x", "/etc/passwd", "nm", "bitmask", "dense", "p:attr", "os.system", "2:4", "1:64", "64:64",
    "4:2", "0", "0.5", ".9999999", "1024x1024@0.5", "1x4@.5", "float", "int8", "int4:row",
    "uint4:64", "int8:3", "٢:٤", "\0", "a\nb", "*", "model.layers.*", "*.*.*.*.*", "F32", "BF16",
    "F8_E4M3", "EVIL", "llama", "gpt2", "mixtral", "x" * 10_000, [], {}, [[]], [0, 0],
    [2**40, 2**40], {"a": {}}, ["model"] * 100,
)  # fmt: skip
NUMBERS = (0, 1, 2, 7, 8, 255, 2**15, 2**31 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**64 - 1)
BYTES = (0x00, 0x01, 0x0F, 0x7F, 0x80, 0x88, 0xF0, 0xFF)


def mutate(rng: random.Random, files: Files) -> str:
    """Damage a folder once, or a few times; what was done, by name."""
    names = []
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        name = rng.choice(sorted(MUTATIONS))
        MUTATIONS[name](rng, files)
        names.append(name)
    return "+".join(names)


def split(blob: bytes) -> tuple[Any, bytes] | None:
    """Header and data of a safetensors file; None when there is no header any more."""
    try:
        (length,) = struct.unpack("<Q", blob[:8])
        return json.loads(blob[8 : 8 + length]), blob[8 + length :]
    except (ValueError, struct.error, RecursionError):
        return None


def join(header: Any, data: bytes) -> bytes:
    """A safetensors file of this header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


def change_somewhere(rng: random.Random, value: Any) -> Any:
    """Replace, remove, add or rename one thing in a JSON value."""
    value = copy.deepcopy(value)
    holders = list(_holders(value))
    if not holders:
        return rng.choice(VALUES)
    holder = rng.choice(holders)
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    what, key = rng.choice(("replace", "replace", "remove", "add", "swap", "step")), None
    key = rng.choice(keys) if keys else None
    if what == "add" or key is None:
        _add(rng, holder)
    elif what == "remove":
        del holder[key]
    elif what == "swap":
        other = rng.choice(keys)
        holder[key], holder[other] = holder[other], holder[key]
    elif what == "step" and isinstance(holder[key], int):
        holder[key] += rng.choice((-8, -1, 1, 8))
    else:
        holder[key] = copy.deepcopy(rng.choice(VALUES))
    return value


def _holders(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)


def _add(rng: random.Random, holder: Any) -> None:
    added = copy.deepcopy(rng.choice(VALUES))
    if isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), added)
    else:
        names = ("x", "auto_map", "quantization_config", "head_dim", "num_experts", "rope_scaling")
        holder[rng.choice(names)] = added


def _pick(rng: random.Random, files: Files, end: str) -> str:
    """A file whose name ends so; those that every reader opens are taken more often."""
    names = sorted(name for name in files if name.endswith(end))
    weights = [8 if name.endswith((WEIGHTS, CONFIG, INDEX)) else 1 for name in names]
    return rng.choices(names, weights)[0]


def _bytes(rng: random.Random, files: Files) -> None:
    name = _pick(rng, files, "")
    data = bytearray(files[name])
    for _ in range(rng.choice((1, 1, 2, 8))):
        if data:
            data[rng.randrange(len(data))] = rng.choice((rng.randrange(256), *BYTES))
    files[name] = bytes(data)


def _bit(rng: random.Random, files: Files) -> None:
    name = _pick(rng, files, WEIGHTS)
    data = bytearray(files[name] or b"\0")
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    files[name] = bytes(data)


def _truncate(rng: random.Random, files: Files) -> None:
    name = _pick(rng, files, "")
    files[name] = files[name][: rng.randrange(len(files[name]) + 1)]


def _extend(rng: random.Random, files: Files) -> None:
    name = _pick(rng, files, "")
    files[name] += rng.randbytes(rng.choice((1, 8, 1000)))


def _run(rng: random.Random, files: Files) -> None:
    name = _pick(rng, files, WEIGHTS)
    data = bytearray(files[name])
    start = rng.randrange(len(data) + 1)
    stop = min(len(data), start + rng.choice((1, 8, 64, 4096)))
    data[start:stop] = bytes([rng.choice(BYTES)]) * (stop - start)
    files[name] = bytes(data)


def _length(rng: random.Random, files: Files) -> None:
    name = _pick(rng, files, WEIGHTS)
    files[name] = struct.pack("<Q", rng.choice(NUMBERS)) + files[name][8:]


def _drop(rng: random.Random, files: Files) -> None:
    if len(files) > 1:
        del files[_pick(rng, files, "")]
    if not any(name.endswith(WEIGHTS) for name in files):
        files["model.safetensors"] = b""


def _header(rng: random.Random, files: Files) -> None:
    name = _pick(rng, files, WEIGHTS)
    found = split(files[name])
    if found is not None:
        files[name] = join(change_somewhere(rng, found[0]), found[1])


def _entry(rng: random.Random, files: Files) -> None:
    """Another tensor's dtype, shape, offsets or name."""
    name = _pick(rng, files, WEIGHTS)
    header, data = split(files[name]) or ({}, b"")
    tensors = _tensors(header)
    if len(tensors) < 2:
        return
    one, other = rng.sample(tensors, 2)
    key = rng.choice(("dtype", "shape", "data_offsets", "name"))
    if key == "name":
        header[one], header[other] = header[other], header[one]
    else:
        header[one][key] = copy.deepcopy(header[other].get(key))
    files[name] = join(header, data)


def _twice(rng: random.Random, files: Files) -> None:
    """One key of a header, or of a JSON file, stands there twice."""
    name = _pick(rng, files, "")
    found = split(files[name]) if name.endswith(WEIGHTS) else (_json(files[name]), b"")
    if found is None or not isinstance(found[0], dict) or not found[0]:
        return
    key = rng.choice(sorted(found[0]))
    again = json.dumps({key: change_somewhere(rng, found[0][key])})[:-1]
    text = f"{again}, {json.dumps(found[0])[1:]}".encode()
    files[name] = join(text, found[1]) if name.endswith(WEIGHTS) else text


def _object(rng: random.Random, files: Files) -> None:
    """Any JSON file."""
    name = _pick(rng, files, ".json")
    files[name] = json.dumps(change_somewhere(rng, _json(files[name]))).encode()


def _manifest(rng: random.Random, files: Files) -> None:
    """The manifest within config.json."""
    config = _json(files.get(CONFIG, b""))
    if isinstance(config, dict):
        config["quantization_config"] = change_somewhere(rng, config.get("quantization_config"))
        files[CONFIG] = json.dumps(config).encode()


def _data(rng: random.Random, files: Files) -> None:
    """Numbers of one part, chosen by name: bits, offsets, scales, zero points, values."""
    name = _pick(rng, files, WEIGHTS)
    header, data = split(files[name]) or ({}, b"")
    part = rng.choice(("values", "bitmask", "row_offsets", "scales", "zeros", "weight"))
    tensors = [tensor for tensor in _tensors(header) if tensor.endswith(f".{part}")]
    if not tensors:
        return
    try:
        start, stop = header[rng.choice(tensors)]["data_offsets"]
        at = rng.randrange(start, stop)
    except (KeyError, TypeError, ValueError):
        return
    size = 8 if part == "row_offsets" else rng.choice((1, 1, 2))
    at -= at % size
    new = struct.pack("<Q", rng.choice((rng.randrange(64), *NUMBERS)))
    new = new if size == 8 else bytes(rng.choice(BYTES) for _ in range(size))
    files[name] = join(header, data[:at] + new + data[at + size :])


def _json(blob: bytes) -> Any:
    try:
        return json.loads(blob)
    except (ValueError, RecursionError):
        return {}


def _tensors(header: Any) -> list[str]:
    """Names of entries that look like tensors."""
    if not isinstance(header, dict):
        return []
    return [name for name, entry in header.items() if isinstance(entry, dict) and "dtype" in entry]


MUTATIONS: dict[str, Callable[[random.Random, Files], None]] = {
    "bytes": _bytes, "bit": _bit, "truncate": _truncate, "extend": _extend, "run": _run,
    "length": _length, "drop": _drop, "header": _header, "entry": _entry, "twice": _twice,
    "object": _object, "manifest": _manifest, "data": _data,
}  # fmt: skip
