"""`gblm export legacy` both ways, on files that compressed-tensors wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Outcome
from legacy_cases import (
    FIXTURES,
    TRUTH,
    UP,
    Pack,
    Tensors,
    altered,
    same_bits,
    truth,
)
from safetensors.torch import load_file
from torch import Tensor

from gblm.checkpoint.inspect import inspect
from gblm.checkpoint.verify import verify
from gblm.commands.export import LAYOUTS
from gblm.errors import CheckpointError, InputError, PatternError, UsageError
from gblm.export.dense import export_dense
from gblm.export.legacy import export_legacy
from gblm.export.legacy_bitmask import PARTS
from gblm.folder import LEGACY_FORMATS


def old_unpack(tensors: Tensors, prefix: str) -> Tensor:
    """What the old library makes of the parts: rows of bits, then values into the places."""
    shape = [int(n) for n in tensors[f"{prefix}.shape"].flatten()]
    bits = np.unpackbits(
        tensors[f"{prefix}.bitmask"].numpy(), axis=-1, count=shape[-1], bitorder="little"
    )
    values = iter(tensors[f"{prefix}.compressed"].flatten().tolist())
    dense = [[next(values) if bit else 0.0 for bit in row] for row in bits]
    return torch.tensor(dense, dtype=tensors[f"{prefix}.compressed"].dtype)


@pytest.mark.parametrize("fixture", TRUTH)
def test_old_files_become_ours_bit_for_bit(fixture: str, tmp_path: Path) -> None:
    report = export_legacy(FIXTURES / fixture, tmp_path / "ours")
    verify(tmp_path / "ours")
    export_dense(tmp_path / "ours", tmp_path / "dense")
    assert same_bits(load_file(tmp_path / "dense/model.safetensors"), truth(fixture))
    assert report["linears"] == 7
    assert [g["format"] for g in inspect(tmp_path / "ours")["groups"]] == [TRUTH[fixture][1]]


def test_both_generations_of_tensor_names_give_the_same_folder(tmp_path: Path) -> None:
    for fixture in ("bitmask", "bitmask-0.8"):
        export_legacy(FIXTURES / fixture, tmp_path / fixture)
    new, old = (load_file(tmp_path / f / "model.safetensors") for f in ("bitmask", "bitmask-0.8"))
    assert same_bits(new, old)


@pytest.mark.parametrize(
    ("fixture", "layout"), [("bitmask", "sparse-bitmask"), ("24-bitmask", "sparse-24-bitmask")]
)
def test_there_and_back_gives_the_old_file(fixture: str, layout: str, tmp_path: Path) -> None:
    export_legacy(FIXTURES / fixture, tmp_path / "ours")
    export_legacy(tmp_path / "ours", tmp_path / "theirs", to=layout)
    wrote, read = (f / "model.safetensors" for f in (tmp_path / "theirs", FIXTURES / fixture))
    assert same_bits(load_file(wrote), load_file(read))
    fields = json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"]
    original = json.loads((FIXTURES / fixture / "config.json").read_text())["quantization_config"]
    assert fields.keys() == original.keys()
    assert fields["sparsity_config"].keys() == original["sparsity_config"].keys()


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        ("2:4", "sparse-24-bitmask"),
        ("1:4", "sparse-24-bitmask"),
        ("2:4", "sparse-bitmask"),
        ("4:8", "sparse-bitmask"),
        ("8:16", "sparse-bitmask"),
        ("0.7", "sparse-bitmask"),
    ],
)
def test_our_floats_become_their_files(
    pattern: str, layout: str, pack_tiny: Pack, tmp_path: Path
) -> None:
    ours = pack_tiny("magnitude", pattern)
    export_legacy(ours, tmp_path / "theirs", to=layout)
    export_dense(ours, tmp_path / "dense")
    wrote = load_file(tmp_path / "theirs/model.safetensors")
    dense = load_file(tmp_path / "dense/model.safetensors")
    packed = {n.removesuffix(".compressed") for n in wrote if n.endswith(".compressed")}
    assert len(packed) == 14
    unpacked = {f"{name}.weight": old_unpack(wrote, name) for name in packed}
    rest = {n: t for n, t in wrote.items() if n.rpartition(".")[0] not in packed}
    assert same_bits(unpacked | rest, dense)
    export_legacy(tmp_path / "theirs", tmp_path / "again")
    verify(tmp_path / "again", against=tmp_path / "dense")
    if pattern in ("4:8", "8:16", "0.7"):
        first, again = (load_file(f / "model.safetensors") for f in (ours, tmp_path / "again"))
        assert same_bits(first, again)


def test_a_pattern_of_another_kind_is_refused(pack_tiny: Pack, tmp_path: Path) -> None:
    with pytest.raises(PatternError, match="2:4 allows 2"):
        export_legacy(pack_tiny("magnitude", "0.5"), tmp_path / "out", to="sparse-24-bitmask")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "how", [{"values": "int4:64"}, {"head": "int8"}, {"pattern": "dense", "values": "int8:row"}]
)
def test_integer_values_are_not_rounded_into_floats(
    how: dict[str, str], pack_tiny: Pack, tmp_path: Path
) -> None:
    ours = pack_tiny(**({"method": "magnitude", "pattern": "2:4"} | how))
    with pytest.raises(InputError, match=r"int\d:.* values .* cannot be written exactly"):
        export_legacy(ours, tmp_path / "out", to="sparse-bitmask")


def test_the_source_decides_the_direction(pack_tiny: Pack, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name the format to write with --to"):
        export_legacy(pack_tiny(), tmp_path / "out")
    with pytest.raises(UsageError, match="leave --to out"):
        export_legacy(FIXTURES / "bitmask", tmp_path / "out", to="sparse-bitmask")
    with pytest.raises(CheckpointError, match="neither by gblm nor by compressed-tensors"):
        export_legacy(tiny, tmp_path / "out")


def test_kept_zeros_keep_their_places(tmp_path: Path) -> None:
    """Groups of the fixture with fewer than two weights: the old library chose where to keep."""
    export_legacy(FIXTURES / "24-bitmask", tmp_path / "ours")
    ours, theirs = (
        load_file(f / "model.safetensors") for f in (tmp_path / "ours", FIXTURES / "24-bitmask")
    )
    assert (theirs[f"{UP}.compressed"] == 0).any()
    assert ours[f"{UP}.bitmask"].equal(theirs[f"{UP}.bitmask"])


def test_negative_zeros_become_zeros(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.compressed"][0, 0] = -0.0

    export_legacy(altered(tmp_path, "24-bitmask", change), tmp_path / "ours")
    values = load_file(tmp_path / "ours/model.safetensors")[f"{UP}.values"]
    assert values[0, 0] == 0
    assert not values[0, 0].signbit()


def test_the_layouts_that_are_offered_are_those_that_are_written() -> None:
    assert set(LAYOUTS) == set(PARTS)
    assert set(PARTS) < set(LEGACY_FORMATS)


def test_a_model_without_zeros_needs_no_packing(tiny: Path, tmp_path: Path) -> None:
    folder = altered(
        tmp_path, "dense", lambda t: t.update({n: torch.ones_like(x) for n, x in t.items()})
    )
    with pytest.raises(InputError, match="use it as a dense model"):
        export_legacy(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "fixture"),
    [("inspect", "dense"), ("verify", "24-bitmask"), ("prune", "bitmask-0.8")],
)
def test_other_commands_name_the_way_out(
    command: str, fixture: str, gblm: Callable[..., Outcome]
) -> None:
    words = ["--output", "out"] if command == "prune" else []
    done = gblm(command, FIXTURES / fixture, *words)
    assert done.code == 4, done
    assert f"`gblm export legacy {FIXTURES / fixture} --output OUT`" in done.err


def test_the_command_converts_and_converts_back(
    gblm: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = gblm("export", "legacy", FIXTURES / "24-bitmask", "--output", tmp_path / "ours")
    assert done.code == 0, done
    assert "7 linears converted to gblm" in done.out
    done = gblm(
        "export", "legacy", tmp_path / "ours", "--output", tmp_path / "theirs",
        "--to", "sparse-24-bitmask", "--json",
    )  # fmt: skip
    assert done.code == 0, done
    assert json.loads(done.out)["layout"] == "sparse-24-bitmask"
    assert (tmp_path / "theirs/model.safetensors").exists()
