"""Recipes with steps: mask, refit, rounding, reconstruction; through whole runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import content
from safetensors.torch import load_file
from test_resume import cut_off

from gblm.errors import UsageError
from gblm.model import load_tokenizer
from gblm.packed import load as load_packed
from gblm.packed import load_any
from gblm.prune import prune
from gblm.recipe import Calibration, Recipe

STEPS = {"rounding": "obs", "refit": {}, "reconstruct": {"epochs": 2, "learning_rate": 1e-3}}


@pytest.fixture
def recipe(tiny: Path, text_file: Path) -> Recipe:
    calibration = Calibration(source=str(text_file), num_samples=8, seq_len=32, batch_size=3)
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
        {"refit": {}, "rounding": rounding, "reconstruct": {"epochs": 4, "learning_rate": 2e-3}},
    )
    apart = []
    for number, step in enumerate(steps):
        folder = tmp_path / str(number)
        prune(with_steps(recipe, values=values, **step), folder)
        apart.append(distance(folder))
    assert apart[0] > apart[1] > apart[2]


@pytest.mark.parametrize("order", ["layer", "sequential"])
@pytest.mark.parametrize("values", ["float", "int4"])
def test_cut_off_it_ends_in_the_same_bytes(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: str, values: str
) -> None:
    fields = STEPS if values != "float" else STEPS | {"rounding": "nearest"}
    batch = 1 if order == "sequential" else 3
    calibration = recipe.to_dict()["calibration"] | {"order": order, "batch_size": batch}
    recipe = with_steps(recipe, values=values, calibration=calibration, **fields)
    prune(recipe, tmp_path / "whole")
    cut_off(recipe, tmp_path / "out", monkeypatch)
    prune(recipe, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_trained_norms_are_stored_and_loaded(recipe: Recipe, tmp_path: Path) -> None:
    prune(with_steps(recipe, reconstruct={"learning_rate": 5e-3}), tmp_path / "out")
    name = "model.layers.1.post_attention_layernorm.weight"
    stored = load_file(tmp_path / "out" / "model.safetensors")[name]
    source = load_file(Path(recipe.model) / "model.safetensors")[name]
    assert stored.dtype == source.dtype
    assert not torch.equal(stored, source)
    model = load_packed(tmp_path / "out", backend="dense")
    assert torch.equal(model.get_parameter(name), stored)


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
        ({"rounding": "obs"}, "integer values"),
        ({"reconstruct": {}, "calibration": None}, "calibration text"),
        ({"reconstruct": {}, "calibration": {"prefix": "dense"}}, "prefix"),
        ({"reconstruct": {"epochs": 0}}, "epochs"),
        ({"reconstruct": {}, "stats": "somewhere"}, "not stats"),
        ({"refit": {"iterations": 0}}, "iterations"),
    ],
)
def test_steps_that_do_not_fit_are_refused(
    recipe: Recipe, fields: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        with_steps(recipe, **fields)


def test_methods_without_data_can_be_reconstructed(recipe: Recipe, tmp_path: Path) -> None:
    fields = {"method": "magnitude", "reconstruct": {}}
    prune(with_steps(recipe, **fields), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()
