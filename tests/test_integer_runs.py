"""Integer values from recipe to folder and back: pruned, packed, verified, loaded, exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome, save_tiny_model
from safetensors.torch import load_file

import gblm.packed
from gblm.checkpoint.inspect import inspect, verify
from gblm.errors import InputError, PatternError
from gblm.export.dense import export_dense
from gblm.export.pack import export_pack
from gblm.methods import make_method
from gblm.methods.pipeline import Pipeline
from gblm.model.folder import ModelFolder
from gblm.model.layers import Layers
from gblm.model.loading import load
from gblm.model.packed_reader import PackedReader
from gblm.model.reader import Reader
from gblm.prune import prune
from gblm.prune.job import Job
from gblm.prune.layer import prune_layer
from gblm.recipe import Choice, Recipe
from gblm.sparse.patterns import parse
from gblm.sparse.values import parse_values, quantize

Pack = Callable[..., Path]
Run = Callable[..., Outcome]
CASES = [("2:4", "int8"), ("2:4", "int4:32"), ("0.5", "int8:row"), ("0.5", "int4"),
         ("dense", "int8"), ("dense", "int4:64"), ("dense", "float")]  # fmt: skip


@pytest.mark.parametrize(("pattern", "values"), CASES)
def test_packed_model_equals_its_dense_export(
    pack_tiny: Pack, tmp_path: Path, pattern: str, values: str
) -> None:
    folder = pack_tiny("wanda", pattern, values)
    export_dense(ModelFolder.open(folder), tmp_path / "dense")
    assert verify(ModelFolder.open(folder), against=ModelFolder.open(tmp_path / "dense"))["ok"]
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        want = load(tmp_path / "dense")(input_ids=ids).logits
        for backend in ("reference", "dense"):
            assert torch.equal(gblm.packed.load(folder, backend)(input_ids=ids).logits, want)


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


@pytest.mark.parametrize("values", ["int8", "int4:32"])
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_codes_are_those_of_the_kept_source_weights(
    tiny: Path, pack_tiny: Pack, pattern: str, values: str
) -> None:
    with (
        PackedReader(ModelFolder.open(pack_tiny("magnitude", pattern, values))) as packed,
        Reader(ModelFolder.open(tiny)) as dense,
    ):
        for name, linear in packed.linears.items():
            found = linear.fmt.unpack(packed.parts(name))
            want = quantize(dense.tensor(f"{name}.weight"), found.mask, linear.fmt.values)
            assert torch.equal(found.codes.view(torch.int8), want.codes.view(torch.int8))
            assert torch.equal(found.scales, want.scales)


def test_later_layers_see_what_the_codes_stand_for(tiny: Path) -> None:
    layers = Layers(load(tiny))
    names = frozenset(n for n, _ in layers.model.named_modules() if n.endswith("up_proj"))
    from gblm.calibrate.walk import Walk, walk

    pipeline, values = Pipeline(make_method("magnitude", {})), parse_values("int4:32")
    choices = dict.fromkeys(sorted(names), Choice(parse("2:4"), values))
    job = Job(None, layers, choices, pipeline)
    for layer in walk(layers, [torch.arange(8).reshape(1, 8)], Walk(frozenset())):
        for name, weight in prune_layer(job, layer).weights.items():
            assert weight.codes is not None
            assert torch.equal(layers.model.get_submodule(name).weight, weight.weight)


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
    assert "| values |" not in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("pattern", "values", "bits"),
    [("2:4", "int8:64", 4 + 1 + 16 / 64), ("2:4", "int4:64", 2 + 1 + 16 / 64),
     ("dense", "int8:64", 8 + 16 / 64), ("dense", "int4:64", 4 + 16 / 64)],
)  # fmt: skip
def test_bits_per_weight_count_masks_codes_and_scales(
    pack_tiny: Pack, pattern: str, values: str, bits: float
) -> None:
    folder = pack_tiny("magnitude", pattern, values)
    report = json.loads((folder / "sparsity_report.json").read_text())
    assert report["bits_per_weight"] == bits
    assert {row["values"] for row in report["tensors"]} == {values}
    (group,) = inspect(ModelFolder.open(folder))["groups"]
    assert (group["bits_per_weight"], group["dtype"]) == (bits, values)
    assert (
        f"{bits:.2f} bits per weight including the mask, codes"
        in (folder / "README.md").read_text()
    )


@pytest.mark.parametrize("values", ["int4:32"])
def test_inspect_counts_kept_codes_of_padded_rows(pack_tiny: Pack, values: str) -> None:
    (group,) = inspect(ModelFolder.open(pack_tiny("magnitude", "0.7", values)))["groups"]
    assert group["sparsity"] == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_any_dense_folder_packs_as_dense(tiny: Path, tmp_path: Path, values: str) -> None:
    report = export_pack(tiny, tmp_path / "out", pattern="dense", values=values)
    verify(ModelFolder.open(tmp_path / "out"))
    assert report["linears"] == 14
    with (
        PackedReader(ModelFolder.open(tmp_path / "out")) as packed,
        Reader(ModelFolder.open(tiny)) as dense,
    ):
        for name, linear in packed.linears.items():
            assert linear.fmt.name == "dense"
            found, source = linear.fmt.unpack(packed.parts(name)), dense.tensor(f"{name}.weight")
            want = quantize(source, found.mask, linear.fmt.values)
            assert torch.equal(found.codes.view(torch.int8), want.codes.view(torch.int8))


def test_dense_float_packing_keeps_every_bit(tiny: Path, tmp_path: Path) -> None:
    export_pack(tiny, tmp_path / "out", pattern="dense")
    verify(ModelFolder.open(tmp_path / "out"), against=ModelFolder.open(tiny))


def test_zeros_made_elsewhere_pack_as_codes(pack_tiny: Pack, tmp_path: Path) -> None:
    export_dense(ModelFolder.open(pack_tiny("magnitude", "2:4")), tmp_path / "dense")
    export_pack(tmp_path / "dense", tmp_path / "again", values="int8:64")
    verify(ModelFolder.open(tmp_path / "again"))
    ours, again = pack_tiny("magnitude", "2:4", "int8:64"), tmp_path / "again"
    first, second = (load_file(folder / "model.safetensors") for folder in (ours, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weights_without_whole_groups_are_refused_before_anything_runs(
    tmp_path: Path,
) -> None:
    odd = save_tiny_model(tmp_path / "odd", intermediate_size=72)
    recipe = Recipe(model=str(odd), method="magnitude", values="int8", calibration=None)
    with pytest.raises(PatternError, match=r"down_proj: 72 columns .*Choose int8:row"):
        prune(recipe, tmp_path / "out")
    prune(recipe.model_copy(update={"values": "int8:row"}), tmp_path / "out")
    verify(ModelFolder.open(tmp_path / "out"))


def test_dense_parts_that_the_manifest_does_not_name_are_refused(
    pack_tiny: Pack, tmp_path: Path
) -> None:
    import shutil

    folder = Path(shutil.copytree(pack_tiny("wanda", "dense", "int8:64"), tmp_path / "out"))
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["groups"][0]["targets"][0]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"down_proj\.values: packed, but the manifest"):
        gblm.packed.load(folder)


def test_values_on_the_command_line(gblm: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gblm("prune", tiny, "--method", "magnitude", "--values", "int8:32",
                "--output", out)  # fmt: skip
    assert done.code == 0, done
    assert "magnitude 2:4 int8:32" in done.out
    assert "mask and scales included" in done.out
    assert json.loads((out / "recipe.json").read_text())["values"] == "int8:32"
    done = gblm("inspect", out)
    assert "int8:32" in done.out
    packed = tmp_path / "packed"
    done = gblm(
        "export", "pack", tiny, "--pattern", "dense", "--values", "int4", "--output", packed
    )
    assert done.code == 0, done
    assert gblm("inspect", packed, "--verify").code == 0
    done = gblm("prune", tiny, "--values", "int5", "--output", tmp_path / "no")
    assert done.code == 4
    assert "give float, or one of int8, int4" in done.err
