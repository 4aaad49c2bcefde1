"""`gblm export legacy` on files that compressed-tensors wrote."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

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

from gblm.checkpoint.inspect import inspect, verify
from gblm.errors import CheckpointError, InputError, UsageError
from gblm.export.dense import export_dense
from gblm.export.legacy import export_legacy
from gblm.model.folder import ModelFolder


@pytest.mark.parametrize("fixture", TRUTH)
def test_old_files_become_ours_bit_for_bit(fixture: str, tmp_path: Path) -> None:
    report = export_legacy(FIXTURES / fixture, tmp_path / "ours")
    verify(ModelFolder.open(tmp_path / "ours"))
    export_dense(ModelFolder.open(tmp_path / "ours"), tmp_path / "dense")
    assert same_bits(load_file(tmp_path / "dense/model.safetensors"), truth(fixture))
    assert report["linears"] == 7
    assert [g["format"] for g in inspect(ModelFolder.open(tmp_path / "ours"))["groups"]] == [
        TRUTH[fixture][1]
    ]


def test_both_generations_of_tensor_names_give_the_same_folder(tmp_path: Path) -> None:
    for fixture in ("bitmask", "bitmask-0.8"):
        export_legacy(FIXTURES / fixture, tmp_path / fixture)
    new, old = (load_file(tmp_path / f / "model.safetensors") for f in ("bitmask", "bitmask-0.8"))
    assert same_bits(new, old)


def test_other_folders_are_refused(pack_tiny: Pack, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="packed by gblm already"):
        export_legacy(pack_tiny(), tmp_path / "out")
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


def test_a_model_without_zeros_needs_no_packing(tiny: Path, tmp_path: Path) -> None:
    folder = altered(
        tmp_path, "dense", lambda t: t.update({n: torch.ones_like(x) for n, x in t.items()})
    )
    with pytest.raises(InputError, match="use it as a dense model"):
        export_legacy(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "fixture"),
    [("inspect", "dense"), ("inspect --verify", "24-bitmask"), ("prune", "bitmask-0.8")],
)
def test_other_commands_name_the_way_out(
    command: str, fixture: str, gblm: Callable[..., Outcome]
) -> None:
    words = ["--output", "out"] if command == "prune" else []
    done = gblm(*command.split(), FIXTURES / fixture, *words)
    assert done.code == 4, done
    assert f"`gblm export legacy {FIXTURES / fixture} --output OUT`" in done.err


def test_the_command_converts(gblm: Callable[..., Outcome], tmp_path: Path) -> None:
    done = gblm("export", "legacy", FIXTURES / "24-bitmask", "--output", tmp_path / "ours")
    assert done.code == 0, done
    assert "7 linears converted" in done.out
