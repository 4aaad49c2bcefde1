"""Damaged panels give an error or some numbers, never a crash. `make sanitize` sees more."""

from __future__ import annotations

import random

import pytest
import torch
from cpu_cases import case, unpack
from torch import Tensor

from gblm.kernels import native

pytestmark = pytest.mark.skipif(
    native.refusal() is not None, reason=f"no CPU kernels: {native.refusal()}; make dev builds them"
)
ROUNDS = 400
HEADER = 64
NUMBERS = (0, 1, 7, 8, 31, 32, 63, 64, 255, 2**31 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**64 - 1)


def mutate(good: bytes, rng: random.Random) -> bytes:
    """One damage: of the header, an offset, any bytes, the length, or everything."""
    data = bytearray(good)
    kind = rng.choice(["header", "number", "bytes", "bits", "run", "short", "long", "noise"])
    if kind == "header":
        data[rng.randrange(HEADER)] = rng.randrange(256)
    elif kind == "number":
        at = 8 * rng.randrange(1, 32)
        data[at : at + 8] = rng.choice(NUMBERS).to_bytes(8, "little")
    elif kind == "bytes":
        for _ in range(rng.randrange(1, 40)):
            data[rng.randrange(HEADER, len(data))] = rng.randrange(256)
    elif kind == "bits":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "run":
        start = rng.randrange(HEADER, len(data))
        data[start:] = bytes([rng.choice([0, 255])]) * (len(data) - start)
    elif kind == "short":
        data = data[: rng.randrange(len(data))]
    elif kind == "long":
        data += rng.randbytes(rng.randrange(1, 5000))
    else:
        data[HEADER:] = rng.randbytes(len(data) - HEADER)
    if len(data) != len(good) and len(data) > HEADER and rng.random() < 0.7:
        data[32:40] = len(data).to_bytes(8, "little")  # agree on the length at least
    return bytes(data)


def exactly(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0).byte()


def number(data: bytes, at: int) -> int:
    """A header's int64, or 1 when it is no size to try."""
    found = int.from_bytes(data[at : at + 8], "little", signed=True)
    return found if 0 < found <= 1 << 16 else 1


def feed(data: bytes) -> int:
    """Offer panels to every entry point; how many took them."""
    panels, taken = exactly(data), 0
    rows, columns = number(data, 8), number(data, 16)
    for tokens in (1, 5, 16, 18, 40):
        x = torch.ones(tokens, columns, dtype=torch.bfloat16)
        try:
            out = torch.ops.gblm.cpu_linear(x, panels, rows)
        except RuntimeError:
            continue
        assert out.shape == (tokens, rows)
        taken += 1
    try:
        values, mask, _ = unpack(panels)
    except native.KernelError:
        return taken
    assert values.shape == mask.shape
    return taken + 1


@pytest.mark.parametrize("mask", ["dense", "any", "4:8", "8:16"])
@pytest.mark.parametrize("values", ["float", "int8", "int4"])
def test_damaged_panels_never_crash(instructions: str, values: str, mask: str) -> None:
    rng = random.Random(f"{values} {mask}")
    good = case((37, 96), values, mask).panels.numpy().tobytes()
    assert feed(good) == 6
    found = [feed(mutate(good, rng)) for _ in range(ROUNDS)]
    # The damage must be neither always seen at once nor never.
    assert 0 in found
    assert max(found) > 0


def test_panels_never_claim_more_memory_than_they_take() -> None:
    good = bytearray(case((37, 96), "float", "any").panels.numpy().tobytes())
    good[16:24] = (1 << 23).to_bytes(8, "little")
    with pytest.raises(native.KernelError, match="damaged"):
        unpack(exactly(bytes(good)))
