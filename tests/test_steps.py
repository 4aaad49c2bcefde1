"""Recipes with steps: mask, refit, rounding, reconstruction; through whole runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import content
from killing import killed_run
from safetensors.torch import load_file
from test_families import save_family
from weights import stored

from gblm.checkpoint.inspect import verify
from gblm.errors import UsageError
from gblm.model.folder import ModelFolder
from gblm.model.loading import load_tokenizer
from gblm.packed import load as load_packed
from gblm.packed import load_any
from gblm.prune import Output, prune
from gblm.recipe import Calibration, Recipe

STEPS = {"rounding": "obs", "refit": {}, "reconstruct": {"epochs": 2, "learning_rate": 0.02}}


@pytest.fixture
def recipe(tiny: Path, text_file: Path) -> Recipe:
    calibration = Calibration(source=str(text_file), num_samples=8, seq_len=32)
    return Recipe(
        model=str(tiny), method="wanda", pattern="2:4", dtype="float32", calibration=calibration
    )


def with_steps(recipe: Recipe, **fields: object) -> Recipe:
    return Recipe.from_dict(recipe.to_dict() | fields)


@pytest.fixture
def distance(recipe: Recipe, text_file: Path) -> Callable[[Path], float]:
    """Mean squared difference of a folder's logits from the dense model's, on the text."""
    ids = load_tokenizer(Path(recipe.model))(text_file.read_text())["input_ids"][: 16 * 32]
    windows = torch.tensor(ids).reshape(16, 32)

    @torch.no_grad()
    def logits(folder: Path, backend: str | None = None) -> torch.Tensor:
        model = load_any(folder, backend, torch.float32)
        return model(input_ids=windows).logits

    want = logits(Path(recipe.model))
    return lambda folder: float((logits(folder, "dense") - want).square().mean())


@pytest.mark.parametrize("values", ["float", "int4"])
def test_each_step_brings_the_model_closer(
    recipe: Recipe, distance: Callable[[Path], float], tmp_path: Path, values: str
) -> None:
    rounding = "nearest" if values == "float" else "obs"
    steps = (
        {},
        {"refit": {}, "rounding": rounding},
        {"refit": {}, "rounding": rounding, "reconstruct": {"epochs": 4, "learning_rate": 0.03}},
    )
    apart = []
    for number, step in enumerate(steps):
        folder = tmp_path / str(number)
        prune(with_steps(recipe, values=values, **step), folder)
        apart.append(distance(folder))
    assert apart[0] > apart[1] > apart[2]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.usefixtures("own_cpu")
def test_killed_at_some_steps_it_ends_in_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    recipe = with_steps(recipe, method="sparsegpt", values="int4", **STEPS)
    prune(recipe, tmp_path / "whole")
    killed = 0
    for step in range(4, 60, 5):
        code = killed_run(recipe.to_dict(), tmp_path / "out", step)
        if code == 0:
            break
        assert code == -9
        killed += 1
        prune(recipe, Output(tmp_path / "out", overwrite=True))
        assert content(tmp_path / "out") == content(tmp_path / "whole"), f"killed at step {step}"
        shutil.rmtree(tmp_path / "out")
    assert killed > 3


@pytest.mark.parametrize("order", ["layer", "sequential"])
def test_activations_on_disk_give_the_same_bytes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    calibration = recipe.to_dict()["calibration"] | {"order": order}
    recipe = with_steps(recipe, values="int4", calibration=calibration, **STEPS)
    prune(recipe, tmp_path / "memory")
    monkeypatch.setattr("gblm.calibrate.activations.MEMORY_SHARE", 0)
    prune(recipe, tmp_path / "disk")
    assert content(tmp_path / "disk") == content(tmp_path / "memory")


def test_trained_norms_are_stored_and_those_of_a_dense_layer_stay(
    recipe: Recipe, tmp_path: Path
) -> None:
    fields = {"ignore": ["layers.1.*"], "reconstruct": {"learning_rate": 0.03}}
    prune(with_steps(recipe, dtype="auto", **fields), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    source = load_file(Path(recipe.model) / "model.safetensors")
    model = load_packed(tmp_path / "out", backend="dense")
    for name in source:
        if "layernorm" in name:
            assert torch.equal(stored[name], source[name]) is (".1." in name), name
            assert stored[name].dtype == source[name].dtype
            assert torch.equal(model.get_parameter(name), stored[name])


def test_the_model_card_holds_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    prune(with_steps(recipe, values="int4", **STEPS), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    shown = json.loads(card.partition("```json\n")[2].partition("```")[0])
    assert shown == json.loads((tmp_path / "out" / "recipe.json").read_text())


@pytest.mark.parametrize("dtype", ["auto", "float16"])
def test_trained_biases_are_stored_and_ignored_linears_stay(
    recipe: Recipe, tmp_path: Path, dtype: str
) -> None:
    source = save_family("qwen2", tmp_path / "qwen2")
    fields = {"model": str(source), "dtype": dtype, "ignore": ["down_proj"], "values": "int4"}
    steps = STEPS | {"reconstruct": {"learning_rate": 0.03}}
    prune(with_steps(recipe, **fields, **steps), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    dense = load_file(source / "model.safetensors")
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.1.self_attn.v_proj.bias"):
        assert stored[name].dtype == dense[name].dtype
        assert not torch.equal(stored[name], dense[name])
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(stored[name], dense[name])
    verify(ModelFolder.open(tmp_path / "out"))


def test_gptq_is_rounding_with_the_dense_pattern(
    recipe: Recipe, distance: Callable[[Path], float], tmp_path: Path
) -> None:
    apart = {}
    for rounding in ("nearest", "obs"):
        fields = {"pattern": "dense", "values": "int4", "rounding": rounding}
        report = prune(with_steps(recipe, **fields), tmp_path / rounding)
        assert report["sparsity"] < 0.2
        apart[rounding] = distance(tmp_path / rounding)
    assert apart["obs"] < apart["nearest"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rounding": "obs"}, "goes with codes"),
        ({"reconstruct": {}, "calibration": None}, "calibration text"),
        ({"reconstruct": {"epochs": 0}}, "epochs"),
        ({"refit": {"iterations": 0}}, "iterations"),
    ],
)
def test_steps_that_do_not_fit_are_refused(
    recipe: Recipe, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        with_steps(recipe, **fields)


@pytest.mark.parametrize("rounding", ["nearest", "obs"])
def test_the_dense_pattern_asks_no_method_for_statistics(
    recipe: Recipe, tmp_path: Path, rounding: str
) -> None:
    """A method chooses nothing there: no gradients are taken, and all methods end alike."""
    fields = {"pattern": "dense", "values": "int4", "rounding": rounding}
    phases: list[str] = []

    def progress(phase: str, steps: int) -> Callable[[], None]:
        phases.append(phase)
        return lambda: None

    for method in ("gblm", "magnitude", "sparsegpt", "alps"):
        prune(with_steps(recipe, method=method, **fields), tmp_path / method, progress)
    assert phases == ["pruning"] * 4
    want = content(tmp_path / "magnitude")["model.safetensors"]
    for method in ("gblm", "sparsegpt", "alps"):
        assert content(tmp_path / method)["model.safetensors"] == want
    text = (tmp_path / "gblm" / "README.md").read_text()
    assert "# tiny: dense int4:64, dense int4:128" in text
    assert "sparse" not in text.split("---")[1]
    calibration = json.loads((tmp_path / "gblm" / "recipe.json").read_text())["calibration"]
    assert (calibration is None) is (rounding == "nearest")


def test_refit_needs_something_that_was_pruned(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dense prunes nothing"):
        prune(with_steps(recipe, pattern="dense", refit={}), tmp_path / "out")
    mixed = [{"targets": ["layers.0.*"], "pattern": "dense"}]
    prune(with_steps(recipe, layers=mixed, refit={}), tmp_path / "out")


def test_only_inputs_of_pruned_linears_are_decomposed(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"method": "alps", "values": "int4", "rounding": "obs"}
    eigh, sizes = torch.linalg.eigh, list[int]()
    monkeypatch.setattr(torch.linalg, "eigh", lambda m: (sizes.append(len(m)), eigh(m))[1])
    prune(with_steps(recipe, pattern="dense", **fields), tmp_path / "dense")
    assert not sizes
    prune(with_steps(recipe, **fields), tmp_path / "sparse")
    assert sorted(sizes) == [64] * 4 + [128] * 4
    sizes.clear()
    mixed = [{"targets": ["mlp.*"], "pattern": "dense"}]
    prune(with_steps(recipe, layers=mixed, **fields), tmp_path / "mixed")
    assert sorted(sizes) == [64] * 2 + [128] * 2
    found = {name: stored(tmp_path / name) for name in ("sparse", "mixed")}
    for local in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.0.self_attn.{local}"
        assert torch.equal(found["mixed"][name][1].weight, found["sparse"][name][1].weight), local
