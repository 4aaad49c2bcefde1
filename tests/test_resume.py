"""A run that is cut off goes on where it was, and ends in the same bytes."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from conftest import content
from damage import flip
from killing import killed_run
from safetensors.torch import load_file, save_file

from gblm.checkpoint import resume
from gblm.checkpoint.resume import open_work, work_path
from gblm.errors import CheckpointError, InputError, MachineError
from gblm.prune import Output, prune
from gblm.recipe import Calibration, Recipe

pytestmark = pytest.mark.usefixtures("own_cpu")

MANY_STEPS = 80
CutOff = Callable[[Recipe], Path]


@pytest.fixture
def recipe(tiny: Path, text_file: Path) -> Recipe:
    calibration = Calibration(source=str(text_file), num_samples=2, seq_len=16)
    return Recipe(model=str(tiny), method="gblm", pattern="0.5", calibration=calibration)


@pytest.fixture
def cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], Path]:
    """Run until one layer is finished, then fail; the work folder that is left."""
    real = resume.WorkFolder.add

    def add(self: resume.WorkFolder, *args: object) -> None:
        if len(self.finished) == 1:
            raise KeyboardInterrupt
        real(self, *args)

    def run(recipe: Recipe) -> Path:
        with monkeypatch.context() as patch:
            patch.setattr(resume.WorkFolder, "add", add)
            with pytest.raises(KeyboardInterrupt):
                prune(recipe, tmp_path / "out")
        return work_path(tmp_path / "out")

    return run


# SparseGPT with every other step: test_steps.py.
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_at_any_step_it_ends_in_the_same_bytes(recipe: Recipe, tmp_path: Path) -> None:
    prune(recipe, tmp_path / "whole")
    want = content(tmp_path / "whole")
    output = tmp_path / "out"
    for step in range(1, MANY_STEPS):
        code = killed_run(recipe.to_dict(), output, step)
        if code == 0:
            break
        assert code == -9
        # Killed after the folder got its name: nothing is left to do but to clean up.
        prune(recipe, Output(output, overwrite=True))
        assert content(output) == want, f"killed at step {step}"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
        shutil.rmtree(output)
    assert code == 0
    assert step > 20


def test_finished_layers_are_not_made_again(
    recipe: Recipe, tmp_path: Path, cut_off: CutOff, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gblm")
    work = cut_off(recipe)
    assert "1 finished decoder layers and the gradients are kept" in caplog.text
    assert "the same command goes on" in caplog.text
    assert not (tmp_path / "out").exists()
    steps = []

    def progress(phase: str, count: int) -> Callable[[], None]:
        steps.append((phase, count))
        return lambda: None

    prune(recipe, tmp_path / "out", progress)
    assert steps == [("pruning", 1)]
    assert "going on after 1 finished decoder layers" in caplog.text
    assert not work.exists()


MIXED = [
    {"targets": ["q_proj", "k_proj", "v_proj"], "pattern": "2:4", "values": "float"},
    {"targets": ["gate_proj", "up_proj"], "pattern": "0.25", "values": "int8"},
]
STEPS = {"refit": {}, "reconstruct": {"epochs": 2, "learning_rate": 0.02}}
# What a recipe may ask for, each at least once: order, values, head, steps, layers.
WAYS: list[dict[str, Any]] = [
    {"values": "int8", "head": "int8"},
    {"method": "sparsegpt", "dtype": "float32", "values": "int4:32",
     "calibration": {"order": "sequential"}},
    {"method": "sparsegpt", "dtype": "float32", "values": "int4", "layers": MIXED},
    {"method": "wanda", "pattern": "2:4", "dtype": "float32", **STEPS},
    {"method": "wanda", "pattern": "2:4", "dtype": "float32", "values": "int4", "head": "int4",
     "rounding": "obs", "calibration": {"order": "sequential"}, **STEPS},
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_way_goes_on_in_the_same_bytes(
    recipe: Recipe, tmp_path: Path, cut_off: CutOff, way: dict[str, Any]
) -> None:
    fields = recipe.to_dict()
    calibration = fields["calibration"] | way.get("calibration", {})
    recipe = Recipe.from_dict(fields | way | {"calibration": calibration})
    prune(recipe, tmp_path / "whole")
    cut_off(recipe)
    prune(recipe, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_cut_off_behind_the_last_layer_the_head_is_rounded_as_before(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.from_dict(recipe.to_dict() | WAYS[-1] | {"calibration": recipe.calibration})
    prune(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(resume.WorkFolder, "mark_complete", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(recipe, tmp_path / "out")
    prune(recipe, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_codes_are_exact_as_they_are_stored(recipe: Recipe, cut_off: CutOff) -> None:
    work = cut_off(recipe.model_copy(update={"values": "int8"}))
    stored = [name for file in work.glob("layer-*.safetensors") for name in load_file(file)]
    assert stored
    assert not any("exact:" in name for name in stored)


def test_the_rest_of_another_recipe_is_refused(
    recipe: Recipe, tmp_path: Path, cut_off: CutOff
) -> None:
    cut_off(recipe)
    for fields, match in (
        ({"head": "int4"}, "recipe.head was 'float', now it is 'int4'"),
        ({"layers": MIXED}, "recipe.layers was"),
    ):
        with pytest.raises(InputError, match=match):
            prune(Recipe.from_dict(recipe.to_dict() | fields), tmp_path / "out")
    other = recipe.model_copy(update={"pattern": "2:4"})
    with pytest.raises(InputError, match=r"recipe\.pattern was '0\.5', now it is '2:4'.*--no-res"):
        prune(other, tmp_path / "out")
    prune(other, Output(tmp_path / "out", resume=False))
    assert json.loads((tmp_path / "out/recipe.json").read_text())["pattern"] == "2:4"


def test_after_bad_input_the_same_command_would_not_go_on(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Path(shutil.copytree(recipe.model, tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    damaged = recipe.model_copy(update={"model": str(model), "method": "wanda"})
    with pytest.raises(CheckpointError, match="holds NaN or Inf"):
        prune(damaged, tmp_path / "out")
    assert "kept in" in caplog.text
    assert "--no-resume starts anew" in caplog.text
    assert "the same command" not in caplog.text


def test_a_changed_model_is_another_run(recipe: Recipe, tmp_path: Path, cut_off: CutOff) -> None:
    model = Path(shutil.copytree(recipe.model, tmp_path / "model"))
    recipe = recipe.model_copy(update={"model": str(model)})
    cut_off(recipe)
    flip()(model)
    with pytest.raises(InputError, match="model_sha256 was"):
        prune(recipe, tmp_path / "out")


@pytest.mark.parametrize("damage", ["flip", "remove", "torn journal", "garbage"])
def test_damaged_layers_are_made_again(
    recipe: Recipe, tmp_path: Path, cut_off: CutOff, damage: str
) -> None:
    prune(recipe, tmp_path / "whole")
    work = cut_off(recipe)
    layer = work / "layer-00000.safetensors"
    if damage == "flip":
        flip(layer.name)(work)
    elif damage == "remove":
        layer.unlink()
    elif damage == "garbage":
        with (work / "journal.jsonl").open("ab") as journal:
            journal.write(b"\xff\x00{")
    else:
        path = work / "journal.jsonl"
        path.write_bytes(path.read_bytes()[:-20])
    prune(recipe, tmp_path / "out")
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_a_run_that_was_cut_off_after_publishing_is_cleaned_up(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(resume, "_remove", lambda path: None)
        prune(recipe, tmp_path / "out")
    assert work_path(tmp_path / "out").exists()
    with pytest.raises(InputError, match="exists"):
        prune(recipe, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_finished_layers_outlive_a_refused_repetition(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off while replacing an older output: what stands there is not the run's own."""
    prune(recipe, tmp_path / "out")
    other = recipe.model_copy(update={"pattern": "2:4"})
    with monkeypatch.context() as patch:
        patch.setattr(
            "gblm.prune.run.write_packed", lambda *args: (_ for _ in ()).throw(OSError("x"))
        )
        with pytest.raises(OSError, match="x"):
            prune(other, Output(tmp_path / "out", overwrite=True))
    with pytest.raises(InputError, match="exists"):
        prune(other, tmp_path / "out")
    assert work_path(tmp_path / "out").exists()
    prune(other, Output(tmp_path / "out", overwrite=True), lambda *phase: pytest.fail)
    assert json.loads((tmp_path / "out/recipe.json").read_text())["pattern"] == "2:4"


def test_two_runs_on_one_output_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    busy = pytest.raises(MachineError, match="another process is working on this output")
    with open_work(tmp_path / "out", {}, resume=True), busy:
        prune(recipe, tmp_path / "out")
    prune(recipe, tmp_path / "out")


def test_a_run_that_fails_before_the_first_layer_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_work(tmp_path / "out", {}, resume=True):
        raise RuntimeError
    assert not list(tmp_path.iterdir())
