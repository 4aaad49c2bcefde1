"""One model, another pattern and value type for each kind of linear: from recipe to logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from alike import exported, logits
from conftest import Run
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from torch import nn
from weights import stored

import gblm.packed
from gblm.checkpoint.inspect import inspect, verify
from gblm.errors import PatternError, UsageError
from gblm.model.folder import ModelFolder
from gblm.model.layers import Layers
from gblm.model.linears import prunable
from gblm.model.reader import Reader
from gblm.prune import prune
from gblm.prune.choose import choose
from gblm.recipe import Calibration, LayerChoice, Recipe
from gblm.sparse.formats.manifest import MAX_GROUPS, Manifest
from gblm.sparse.values import quantize

ATTENTION = LayerChoice(targets=("q_proj", "k_proj", "v_proj"), pattern="2:4", values="float")
MLP = LayerChoice(targets=("gate_proj", "up_proj"), pattern="dense", values="int8")
# Last part of the name → format, and bits per weight of the tiny model's shapes.
WANTED = {
    "q_proj": "nm/2:4", "k_proj": "nm/2:4", "v_proj": "nm/2:4", "gate_proj": "dense/dense/int8:64",
    "up_proj": "dense/dense/int8:64", "o_proj": "bitmask/0.5/int4:128",
    "down_proj": "bitmask/0.5/int4:128",
}  # fmt: skip
OFFSETS = 64 * 65 / (64 * 128)  # 65 int64 for 64 rows of 128
BITS = {
    "nm/2:4": 9.0, "dense/dense/int8:64": 8 + 16 / 64,
    "bitmask/0.5/int4:128": 2 + 1 + 16 / 128 + OFFSETS,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tiny: Path, text_file: Path) -> Recipe:
    calibration = Calibration(source=str(text_file), num_samples=2, seq_len=16)
    return Recipe(
        model=str(tiny), method="wanda", pattern="0.5", values="int4", layers=(ATTENTION, MLP),
        calibration=calibration,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixed") / "out"
    prune(recipe, path)
    return path


def with_layers(recipe: Recipe, *layers: dict[str, Any], **fields: Any) -> Recipe:
    return Recipe.from_dict(recipe.to_dict() | {"layers": layers} | fields)


def spec_of(group: dict[str, Any]) -> str:
    values = group.get("values", group.get("dtype", "float"))
    floats = values in ("float", "bfloat16")
    return f"{group['format']}/{group['pattern']}" + ("" if floats else f"/{values}")


def test_each_linear_is_stored_as_chosen(folder: Path, tiny: Path) -> None:
    found, source = stored(folder), load_file(tiny / "model.safetensors")
    assert len(found) == 14
    for name, (fmt, weight) in found.items():
        assert fmt.spec == WANTED[name.rpartition(".")[2]]
        dense = source[f"{name}.weight"]
        fmt.pattern.check_mask(name, weight.mask)
        assert float(weight.mask.float().mean()) == 1 - fmt.pattern.sparsity
        if fmt.values.is_float:
            assert torch.equal(weight.weight[weight.mask], dense[weight.mask])
        else:
            assert torch.equal(weight.codes, quantize(dense, weight.mask, fmt.values).codes)


def test_logits_are_those_of_the_dense_export(folder: Path, tmp_path: Path) -> None:
    want = exported(folder, tmp_path / "dense")
    assert (logits(gblm.packed.load(folder)) - want).float().norm() < 0.08 * want.float().norm()


def test_bits_are_counted_by_group(folder: Path, recipe: Recipe) -> None:
    report = json.loads((folder / "sparsity_report.json").read_text())
    for groups in (report["groups"], inspect(ModelFolder.open(folder))["groups"]):
        found = {spec_of(group): group for group in groups}
        assert found.keys() == BITS.keys()
        for spec, bits in BITS.items():
            assert found[spec]["bits_per_weight"] == pytest.approx(bits, abs=1e-4)
            assert found[spec]["linears"] == sum(want == spec for want in WANTED.values()) * 2
    sizes = {row["name"]: row["shape"][0] * row["shape"][1] for row in report["tensors"]}
    mean = sum(BITS[WANTED[name.rpartition(".")[2]]] * size for name, size in sizes.items())
    assert report["bits_per_weight"] == pytest.approx(mean / sum(sizes.values()), abs=1e-4)


def test_the_manifest_has_a_group_for_each_way(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    manifest = Manifest.from_config(config)
    assert manifest.to_config() == config
    assert {spec_of(group): len(group["targets"]) for group in config["groups"]} == {
        "nm/2:4": 3, "dense/dense/int8:64": 2, "bitmask/0.5/int4:128": 2
    }  # fmt: skip
    assert all("*" in target for group in config["groups"] for target in group["targets"])


def test_layers_may_differ_as_well(recipe: Recipe, tmp_path: Path) -> None:
    first = {"targets": ["layers.0.*"], "pattern": "0.25", "values": "float"}
    prune(with_layers(recipe, first), tmp_path / "out")
    verify(ModelFolder.open(tmp_path / "out"))
    for name, (fmt, _) in stored(tmp_path / "out").items():
        assert fmt.spec.startswith("bitmask/0.25" if ".0." in name else "bitmask/0.5/int4:")


def test_the_card_tells_of_the_mix(folder: Path) -> None:
    card = (folder / "README.md").read_text()
    assert "# tiny: 2:4, 0.5 int4:" in card
    tags = ModelCard(card).data.tags
    assert tags[1:9] == ["pruned", "2:4", "0.5", "dense", "int4", "int8", "4-bit", "8-bit"]


def test_the_first_choice_that_matches_decides(recipe: Recipe) -> None:
    special = {"targets": ["1.mlp.down_proj"], "pattern": "4:8"}
    rest = {"targets": ["*.down_proj", "o_proj"], "values": "int8:32"}
    # The parts of a fused linear may differ in sparsity.
    key = {"targets": ["k_proj"], "pattern": "0.25"}
    formats = chosen(with_layers(recipe, special, rest, key))
    assert formats["model.layers.1.mlp.down_proj"].spec == "nm/4:8/int4:128"
    assert formats["model.layers.0.mlp.down_proj"].spec == "bitmask/0.5/int8:32"
    assert formats["model.layers.0.self_attn.q_proj"].spec == "bitmask/0.5/int4:64"
    assert formats["model.layers.0.self_attn.k_proj"].spec == "bitmask/0.25/int4:64"


def chosen(recipe: Recipe) -> Any:
    with Reader(ModelFolder.open(Path(recipe.model))) as reader:
        names = [f"model.layers.{index}" for index in range(2)]
        return choose(recipe, prunable(Layers(reader).model, recipe.ignore), names)


def test_ends_stay_dense_where_the_model_has_enough_layers(
    recipe: Recipe, caplog: pytest.LogCaptureFixture
) -> None:
    linears = {
        f"model.layers.{index}.{part}": nn.Linear(64, 64)
        for index in range(16)
        for part in ("self_attn.q_proj", "mlp.down_proj")
    }
    names = [f"model.layers.{index}" for index in range(16)]
    own = LayerChoice(targets=("0.mlp.down_proj",), pattern="2:4")
    two = recipe.model_copy(update={"layers": (own,), "dense_ends": 2})
    formats = choose(two, linears, names)
    dense = [name for name, fmt in formats.items() if fmt.spec == "dense/dense/int4:64"]
    ends = [f"model.layers.{index}.self_attn.q_proj" for index in (0, 1, 14, 15)]
    assert [name for name in dense if "q_proj" in name] == ends
    assert len(dense) == 7  # the recipe's own exception decides first
    three = two.model_copy(update={"dense_ends": 3})
    with caplog.at_level("INFO", logger="gblm"):
        pruned = choose(three, linears, names)
    assert not any(fmt.spec.startswith("dense") for fmt in pruned.values())
    assert "all of the 16 decoder layers are pruned" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="gblm"):
        choose(three.model_copy(update={"pattern": "dense", "layers": ()}), linears, names)
    assert not caplog.text


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ([{"targets": ["qproj"], "pattern": "2:4"}], "'qproj' matches no linear that is pruned"),
        ([{"targets": ["o_proj", "x"], "pattern": "2:4"}], "'x' matches no linear"),
        ([{"targets": ["*"]}, {"targets": ["o_proj"], "pattern": "2:4"}], "'o_proj' come after"),
        (
            [{"targets": ["k_proj"], "pattern": "2:4"}],
            r"layers\.0\.self_attn: q_proj bitmask/0\.5/int4:64, k_proj nm/2:4/int4:64, v_proj",
        ),
        ([{"targets": ["up_proj"], "values": "int8"}], "up_proj bitmask/0.5/int8:64 are one"),
        ([{"targets": [], "pattern": "2:4"}], r"layers\.0\.targets"),
        ([{"targets": ["o_proj"], "patern": "2:4"}], r"layers\.0\.patern"),
        ([{"targets": ["o_proj"], "pattern": "2_4"}], "pattern '2_4' is unknown"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(
    recipe: Recipe, tmp_path: Path, layers: list[dict[str, Any]], match: str
) -> None:
    with pytest.raises((PatternError, UsageError), match=match):
        prune(with_layers(recipe, *layers), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_hundreds_of_names_are_looked_up_at_once() -> None:
    names = [f"model.layers.{i}.mlp.up_proj" for i in range(MAX_GROUPS - 1)]
    last = {"format": "nm", "pattern": "2:4", "targets": ["*.up_proj"]}
    groups = [{"format": "bitmask", "pattern": f"0.{i:04}", "targets": [name, f"{name}.*"]}
              for i, name in enumerate(names)]  # fmt: skip
    manifest = Manifest.from_config(
        {"quant_method": "gblm", "version": 1, "groups": [*groups, last]}
    )
    for name in ("model.layers.5.mlp.up_proj", "model.layers.5.mlp.up_proj.x"):
        fmt = manifest.format_of(name)
        assert fmt is not None
        assert fmt.spec == "bitmask/0.0005"
    other = manifest.format_of("model.layers.5000.mlp.up_proj")
    assert other is not None
    assert other.spec == "nm/2:4"


def test_the_command_line_shows_the_mix(
    gblm: Run, recipe: Recipe, folder: Path, tmp_path: Path
) -> None:
    file = folder / "recipe.json"
    done = gblm("prune", "--recipe", file, "--output", tmp_path / "again", "--dry-run")
    assert done.code == 0, done
    rows = [line.split() for line in done.out.splitlines()]
    assert ["pattern", "values", "linears", "weights", "bits/weight"] in rows
    assert ["dense", "int8:64", "4", "32,768", "8.25"] in rows
    done = gblm("prune", "--recipe", file, "--output", tmp_path / "again")
    assert done.code == 0, done
    assert "wanda 2:4, 0.5 int4:128, dense int8:64, 14 linears" in done.out
    done = gblm("inspect", tmp_path / "again")
    assert sorted(line.split()[:4] for line in done.out.splitlines()[2:5]) == [
        ["0.5", "bitmask", "int4:128", "4"],
        ["2:4", "nm", "bfloat16", "6"],
        ["dense", "dense", "int8:64", "4"],
    ]
