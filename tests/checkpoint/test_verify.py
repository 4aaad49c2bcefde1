"""A damaged packed folder never passes; an intact one always does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Pack, Run
from damage import UP, flip, rehash, tensors

from gblm.checkpoint.inspect import inspect, verify
from gblm.errors import CheckpointError, InputError
from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change tensors and make the hashes fit again, as a careful attacker would."""
    tensors(how)(folder)
    rehash(folder)


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "recipe.json"]
)
def test_one_changed_byte_is_found(packed: Path, name: str) -> None:
    flip(name, -2)(packed)
    with pytest.raises(InputError, match=name):
        verify(ModelFolder.open(packed))


def test_missing_and_added_files_are_found(packed: Path) -> None:
    (packed / "extra.bin").touch()
    with pytest.raises(CheckpointError, match="does not stand in MANIFEST"):
        verify(ModelFolder.open(packed))
    (packed / "extra.bin").rename(packed / "extra.safetensors")
    with pytest.raises(CheckpointError, match="belongs to no index"):
        PackedReader(ModelFolder.open(packed))
    (packed / "extra.safetensors").unlink()
    (packed / "README.md").unlink()
    with pytest.raises(CheckpointError, match=r"README\.md is missing"):
        verify(ModelFolder.open(packed))


def test_negative_zero_in_a_file_is_found(packed: Path) -> None:
    change(packed, lambda found: found[f"{UP}.values"][0].fill_(-0.0))
    with pytest.raises(CheckpointError, match="gives other bytes"):
        verify(ModelFolder.open(packed))


def test_report_that_tells_another_story_is_found(packed: Path) -> None:
    change(packed, lambda found: found[f"{UP}.values"][0].fill_(0.0))
    with pytest.raises(CheckpointError, match=r"sparsity_report\.json does not describe"):
        verify(ModelFolder.open(packed))


def test_manifest_file_names_cannot_leave_the_folder(packed: Path) -> None:
    manifest = json.loads((packed / "MANIFEST.json").read_text())
    manifest["files"]["../../x"] = {"sha256": "", "size": 0}
    (packed / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="leads out"):
        verify(ModelFolder.open(packed))


def test_inspect_counts_zeros_of_a_dense_folder(pack_tiny: Pack, tmp_path: Path) -> None:
    export_dense(ModelFolder.open(pack_tiny()), tmp_path / "dense")
    facts = inspect(ModelFolder.open(tmp_path / "dense"))
    assert (facts["kind"], facts["sparsity"]) == ("dense", 0.5)


def test_foreign_quantisation_is_refused(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="'awq', which gblm cannot read"):
        inspect(ModelFolder.open(packed))


def test_two_folders_are_shown(tiny: Path, pack_tiny: Pack, gblm: Run) -> None:
    shown = gblm("inspect", tiny, pack_tiny())
    assert shown.code == 0
    assert "llama, dense" in shown.out
    assert "llama, packed" in shown.out


def test_verified_against_another_folder_the_first_difference_is_named(
    tiny: Path, pack_tiny: Pack, gblm: Run
) -> None:
    done = gblm("inspect", pack_tiny(), tiny, "--verify")
    assert done.code == 4
    assert "the packed weight is not the one in" in done.err
