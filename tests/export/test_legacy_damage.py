"""`gblm export legacy` on damaged and hostile files: one sentence, never a wrong weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from legacy_cases import (
    UP,
    Tensors,
    altered,
    drop,
    put,
)
from torch import Tensor

from gblm.errors import CheckpointError, InputError
from gblm.export.legacy import export_legacy
from gblm.export.legacy_folder import LegacyReader
from gblm.export.legacy_layouts import PARTS, BitmaskTensor
from gblm.model.folder import ModelFolder


def flip(tensor: Tensor) -> Tensor:
    """One bit of the first byte that has a set bit and a clear one."""
    return tensor ^ (torch.arange(tensor.numel()).reshape(tensor.shape) == 9).to(tensor.dtype)


DAMAGE = {
    "part missing": (drop("bitmask"), "up_proj.bitmask is missing"),
    "all parts missing": (
        lambda t: [t.pop(f"{UP}.{part}") for part in PARTS["sparse-bitmask"]],
        "up_proj.weight is missing",
    ),
    "shape of other size": (put("shape", lambda t: t + 8), "needs"),
    "shape not positive": (put("shape", lambda t: t * 0), r"\[0, 0\] is no shape"),
    "shape negative": (put("shape", lambda t: -t), "is no shape"),
    "shape huge": (put("shape", lambda t: t + 2**62), "needs"),
    "shape transposed": (put("shape", lambda t: t.flip(0)), "needs"),
    "shape of three": (put("shape", lambda t: torch.ones(3, dtype=t.dtype)), "holds no shape"),
    "shape of floats": (put("shape", lambda t: t.float()), "holds no shape"),
    "bitmask of other width": (put("bitmask", lambda t: t[:, :-1]), "needs"),
    "bitmask of other dtype": (put("bitmask", lambda t: t.to(torch.int8)), "needs"),
    "bit flipped": (put("bitmask", flip), "do not count the bits"),
    "offsets shifted": (put("row_offsets", lambda t: t + 1), "do not count the bits before row 0"),
    "offsets negative": (put("row_offsets", lambda t: -t), "do not count the bits"),
    "offsets of int32": (put("row_offsets", lambda t: t.int()), "needs"),
    "offset missing": (put("row_offsets", lambda t: t[:-1]), "needs"),
    "value missing": (put("compressed", lambda t: t[:-1]), "values for"),
    "value too many": (put("compressed", lambda t: torch.cat([t, t[:1]])), "values for"),
    "more values than places": (put("compressed", lambda t: t.repeat(9)), "needs"),
    "values of integers": (put("compressed", lambda t: t.int()), "floats are needed"),
    "stored twice": (
        lambda t: t.update({f"{UP}.weight": torch.zeros(64, 32, dtype=torch.bfloat16)}),
        "stored twice",
    ),
    "stored twice in parts": (
        lambda t: t.update(
            {f"{UP}.weight.{p}": t[f"{UP}.{p}"].clone() for p in PARTS["sparse-bitmask"]}
        ),
        "stored twice",
    ),
    "another size than the model": (
        lambda t: t.update(
            {f"{UP}.{p}": t[f"{UP.replace('up', 'down')}.{p}"] for p in PARTS["sparse-bitmask"]}
        ),
        "config.json makes it",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(kind: str, tmp_path: Path) -> None:
    change, sentence = DAMAGE[kind]
    with pytest.raises(CheckpointError, match=sentence):
        export_legacy(altered(tmp_path, "bitmask", change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("bitmask", flip), "does not keep two of row"),
        (put("compressed", lambda t: t[:, :-1]), "needs"),
        (put("shape", lambda t: t[:1, 0]), "is no shape of sparse-24-bitmask"),
        (
            lambda t: t.update({f"{UP}.row_offsets": torch.zeros(64, dtype=torch.int64)}),
            "is no part of sparse-24-bitmask",
        ),
    ],
)
def test_damage_of_2_4_is_found(
    change: Callable[[Tensors], object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        export_legacy(altered(tmp_path, "24-bitmask", change), tmp_path / "out")


def test_bits_behind_the_last_column_are_damage() -> None:
    headers = {
        "bitmask": ((1, 1), torch.uint8),
        "compressed": ((1,), torch.float32),
        "row_offsets": ((1,), torch.int64),
    }
    tensor = BitmaskTensor.of("x", "sparse-bitmask", headers, [1, 5])
    parts = {"compressed": torch.ones(1), "row_offsets": torch.zeros(1, dtype=torch.int64)}
    good = tensor.mask({"bitmask": torch.tensor([[16]], dtype=torch.uint8), **parts})
    assert good.tolist() == [[False] * 4 + [True]]
    with pytest.raises(CheckpointError, match="bits behind column 4"):
        tensor.mask({"bitmask": torch.tensor([[32]], dtype=torch.uint8), **parts})


@pytest.mark.parametrize("seed", range(15))
def test_a_damaged_header_is_never_a_crash(seed: int, tmp_path: Path) -> None:
    folder = altered(tmp_path, ("bitmask", "24-int8-group", "marlin-int8")[seed % 3])
    path, draw = folder / "model.safetensors", np.random.default_rng(seed)
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    for place in draw.integers(0, 8 + length, size=2):
        data[place] = draw.integers(256)
    path.write_bytes(bytes(data[: len(data) if seed % 5 else draw.integers(len(data))]))
    try:
        with LegacyReader(ModelFolder.open(folder)) as reader:
            for name in reader:
                assert tuple(reader.tensor(name).shape) == reader.headers[name][0]
    except InputError:
        pass  # one sentence


@pytest.mark.parametrize(
    "name", ["os:system", "sparse_bitmask", "../x", "", None, 7, ["sparse-bitmask"], {"a": 1}]
)
def test_format_names_come_from_a_closed_list(name: object, tmp_path: Path) -> None:
    folder = altered(tmp_path, "bitmask", config=lambda c: c["sparsity_config"].update(format=name))
    with pytest.raises(
        CheckpointError, match=r"sparsity format .* is unknown; known are sparse-24"
    ):
        export_legacy(folder, tmp_path / "out")
