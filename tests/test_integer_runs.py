"""Integer values from recipe to folder and back: pruned, packed, verified, loaded, exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from alike import assert_same_tensors
from conftest import Pack, save_tiny_model
from damage import config, damaged

import gblm.packed
from gblm.checkpoint.inspect import inspect, verify
from gblm.errors import InputError, PatternError
from gblm.export.dense import export_dense
from gblm.export.pack import export_pack
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
from gblm.prune import prune
from gblm.recipe import Recipe
from gblm.sparse.patterns import parse


@pytest.mark.parametrize(("pattern", "values"), [("2:4", "int8"), ("0.5", "int4")])
def test_codes_and_scales_are_never_cast(pack_tiny: Pack, pattern: str, values: str) -> None:
    folder = pack_tiny("wanda", pattern, values)
    model = gblm.packed.load(folder, "reference", dtype=torch.float32)
    with PackedReader(ModelFolder.open(folder)) as packed:
        for name, linear in packed.linears.items():
            module = model.get_submodule(name)
            stored = packed.parts(name)
            for part, tensor in zip(linear.fmt.parts, module.prepared, strict=True):
                assert tensor.dtype == stored[part].dtype
                assert torch.equal(tensor.view(torch.uint8), stored[part].view(torch.uint8))
    assert model(input_ids=torch.arange(4).reshape(1, 4)).logits.dtype == torch.float32


def test_each_group_size_is_a_group_of_the_manifest(pack_tiny: Pack) -> None:
    config = json.loads((pack_tiny("wanda", "2:4", "int8") / "config.json").read_text())
    groups = config["quantization_config"]["groups"]
    assert [(g["format"], g["pattern"], g["values"]) for g in groups] == [
        ("nm", "2:4", "int8:128"), ("nm", "2:4", "int8:64")
    ]  # fmt: skip
    assert groups[0]["targets"] == [
        "model.layers.*.mlp.down_proj", "model.layers.*.self_attn.o_proj"
    ]  # fmt: skip


def test_float_folders_do_not_mention_values(pack_tiny: Pack) -> None:
    folder = pack_tiny()
    assert "values" not in (folder / "config.json").read_text()
    assert '"values"' not in (folder / "sparsity_report.json").read_text()


@pytest.mark.parametrize(
    ("pattern", "values", "bits"),
    [("2:4", "float", 8 + 1), ("8:16", "float", 8 + 1), ("1:4", "float", 4 + 1),
     ("2:4", "int8:64", 4 + 1 + 16 / 64), ("2:4", "int4:64", 2 + 1 + 16 / 64),
     ("dense", "int8:64", 8 + 16 / 64), ("dense", "int4:64", 4 + 16 / 64)],
)  # fmt: skip
def test_bits_per_weight_count_masks_codes_and_scales(
    pack_tiny: Pack, pattern: str, values: str, bits: float
) -> None:
    folder = pack_tiny("magnitude", pattern, values)
    report = json.loads((folder / "sparsity_report.json").read_text())
    assert (report["bits_per_weight"], report["linears"]) == (bits, 14)
    assert {row["bits_per_weight"] for row in report["tensors"]} == {bits}
    facts = inspect(ModelFolder.open(folder))
    (group,) = facts["groups"]
    dtype = "bfloat16" if values == "float" else values
    assert (group["bits_per_weight"], group["dtype"], group["linears"]) == (bits, dtype, 14)
    assert group["sparsity"] == pytest.approx(parse(pattern).sparsity)
    assert facts["kind"] == "packed"
    assert facts["bytes"] < facts["bytes_if_dense"]
    card = (folder / "README.md").read_text()
    assert f"{bits:.2f} bits per weight including masks" in card


def test_inspect_counts_kept_codes_of_padded_rows(pack_tiny: Pack) -> None:
    (group,) = inspect(ModelFolder.open(pack_tiny("magnitude", "0.7", "int4:32")))["groups"]
    assert group["sparsity"] == pytest.approx(0.7, abs=1e-3)


def test_dense_float_packing_keeps_every_bit(tiny: Path, tmp_path: Path) -> None:
    export_pack(tiny, tmp_path / "out", pattern="dense")
    verify(ModelFolder.open(tmp_path / "out"), against=ModelFolder.open(tiny))


def test_zeros_made_elsewhere_pack_as_codes(pack_tiny: Pack, tmp_path: Path) -> None:
    export_dense(ModelFolder.open(pack_tiny("magnitude", "2:4")), tmp_path / "dense")
    export_pack(tmp_path / "dense", tmp_path / "again", values="int8:64")
    verify(ModelFolder.open(tmp_path / "again"))
    assert_same_tensors(pack_tiny("magnitude", "2:4", "int8:64"), tmp_path / "again")


def test_weights_without_whole_groups_are_refused_before_anything_runs(tmp_path: Path) -> None:
    odd = save_tiny_model(tmp_path / "odd", intermediate_size=72)
    recipe = Recipe(model=str(odd), method="magnitude", values="int8", calibration=None)
    with pytest.raises(PatternError, match=r"down_proj: 72 columns .*Choose int8:row"):
        prune(recipe, tmp_path / "out")
    prune(recipe.model_copy(update={"values": "int8:row"}), tmp_path / "out")
    verify(ModelFolder.open(tmp_path / "out"))


def test_dense_parts_that_the_manifest_does_not_name_are_refused(
    pack_tiny: Pack, tmp_path: Path
) -> None:
    unnamed = config(lambda found: found["quantization_config"]["groups"][0]["targets"].pop(0))
    folder = damaged(pack_tiny("wanda", "dense", "int8:64"), tmp_path / "out", unnamed)
    with pytest.raises(InputError, match=r"down_proj\.values: packed, but the manifest"):
        gblm.packed.load(folder)
