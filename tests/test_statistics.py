"""Saved statistics: one pass over the text serves several recipes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model

from gblm.calibrate import walk as walk_module
from gblm.calibrate.saved import StatsFolder
from gblm.errors import InputError, UsageError
from gblm.prune import Output, prune
from gblm.recipe import Calibration, Recipe

WEIGHTS = "model.safetensors"


@pytest.fixture
def recipe(tiny: Path, text_file: Path) -> Recipe:
    calibration = Calibration(source=str(text_file), num_samples=3, seq_len=16)
    return Recipe(model=str(tiny), method="gblm", pattern="2:4", calibration=calibration)


def forbid_forward_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object) -> None:
        raise AssertionError("a forward pass was run")

    monkeypatch.setattr(walk_module, "capture", forbidden)
    monkeypatch.setattr("gblm.calibrate.gradients.capture", forbidden)


@pytest.mark.parametrize(
    ("method", "order"),
    [("gblm", "layer"), ("sparsegpt", "sequential")],
)
def test_saved_statistics_repeat_the_run_without_a_forward_pass(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, order: str
) -> None:
    calibration = recipe.calibration.model_copy(update={"order": order})
    recipe = recipe.model_copy(update={"method": method, "calibration": calibration})
    prune(recipe, Output(tmp_path / "first", save_stats=tmp_path / "stats"))
    forbid_forward_passes(monkeypatch)
    second = recipe.model_copy(update={"stats": str(tmp_path / "stats")})
    prune(second, tmp_path / "second")
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (
        tmp_path / "second" / WEIGHTS
    ).read_bytes()
    assert json.loads((tmp_path / "second/recipe.json").read_text())["calibration"] is None


def test_dense_statistics_serve_any_method_that_needs_no_more(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = recipe.calibration.model_copy(update={"prefix": "dense"})
    recipe = recipe.model_copy(update={"calibration": dense})
    prune(recipe, Output(tmp_path / "first", save_stats=tmp_path / "stats"))
    assert StatsFolder(tmp_path / "stats").facts()["prefix"] == "dense"
    prune(recipe.model_copy(update={"method": "wanda", "pattern": "0.7"}), tmp_path / "want")
    forbid_forward_passes(monkeypatch)
    wanda = recipe.model_copy(
        update={"method": "wanda", "pattern": "0.7", "stats": str(tmp_path / "stats")}
    )
    prune(wanda, tmp_path / "got")
    assert (tmp_path / "got" / WEIGHTS).read_bytes() == (tmp_path / "want" / WEIGHTS).read_bytes()


def test_statistics_that_do_not_fit_are_refused(recipe: Recipe, tmp_path: Path, tiny: Path) -> None:
    stats = tmp_path / "stats"
    prune(recipe, Output(tmp_path / "first", save_stats=stats))
    saved = recipe.model_copy(update={"stats": str(stats)})

    def refuse(error: type[Exception], match: str, **update: object) -> None:
        with pytest.raises(error, match=match):
            prune(saved.model_copy(update=update), tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refuse(UsageError, "lacks hessian", method="sparsegpt")
    refuse(UsageError, "holds l2 gradient norms", options={"gradient_norm": "l1"})
    refuse(InputError, r"stats\.json is missing", stats=str(tmp_path))
    other = save_tiny_model(tmp_path / "other", num_key_value_heads=4)
    refuse(InputError, "statistics of another model", model=str(other))
    (stats / "layer-00001.safetensors").write_bytes(b"")
    refuse(InputError, "layer-00001.safetensors holds no statistics")
    (stats / "layer-00001.safetensors").unlink()
    refuse(InputError, "layer-00001.safetensors is missing")


def test_places_for_statistics_are_checked_first(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "stats").mkdir()

    def refuse(error: type[Exception], match: str, place: str, **update: object) -> None:
        with pytest.raises(error, match=match):
            prune(
                recipe.model_copy(update=update),
                Output(tmp_path / "out", save_stats=tmp_path / place),
            )
        assert [p.name for p in tmp_path.iterdir()] == ["stats"]

    refuse(InputError, "exists; choose another --save-stats", "stats")
    refuse(UsageError, "collects no statistics", "new", method="magnitude")
    refuse(UsageError, "nothing new is collected", "new", stats=str(tmp_path / "stats"))
    refuse(UsageError, "lie in one another", "out/stats")
    refuse(UsageError, "lie in one another", "out")


def test_statistics_of_fewer_linears_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    stats = tmp_path / "stats"
    some = recipe.model_copy(update={"targets": ("*.mlp.*",)})
    prune(some, Output(tmp_path / "first", save_stats=stats))
    prune(some.model_copy(update={"stats": str(stats)}), tmp_path / "second")
    with pytest.raises(UsageError, match=r"holds nothing of model\.layers\.0\.self_attn"):
        prune(recipe.model_copy(update={"stats": str(stats)}), tmp_path / "third")


def test_foreign_prefixes_are_told(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prune(recipe, Output(tmp_path / "first", save_stats=tmp_path / "stats"))
    prune(recipe.model_copy(update={"stats": str(tmp_path / "stats")}), tmp_path / "second")
    assert "taken behind layers pruned by gblm 2:4" in caplog.text


def test_statistics_are_whole_after_a_resumed_run(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prune(recipe, Output(tmp_path / "one", save_stats=tmp_path / "stats-one"))
    broken = Output(tmp_path / "two", save_stats=tmp_path / "stats-two")
    with monkeypatch.context() as patch:
        patch.setattr(
            "gblm.prune.run.write_packed", lambda *args: (_ for _ in ()).throw(OSError("x"))
        )
        with pytest.raises(OSError, match="x"):
            prune(recipe, broken)
    assert (tmp_path / "stats-two/stats.json").exists()
    prune(recipe, broken)
    for file in (tmp_path / "stats-one").iterdir():
        assert file.read_bytes() == (tmp_path / "stats-two" / file.name).read_bytes()


def test_shared_tensors_are_stored_once_and_shared_again(tmp_path: Path) -> None:
    hessian, other = torch.eye(3), torch.ones(3, 3)
    folder = StatsFolder(tmp_path)
    layer = {"q": {"hessian": hessian}, "k": {"hessian": hessian}, "o": {"hessian": other}}
    folder.write(0, layer)
    size = (tmp_path / "layer-00000.safetensors").stat().st_size
    assert size < 3 * 36 + 400
    got = folder.read(0, frozenset({"hessian"}))
    assert got["q"]["hessian"] is got["k"]["hessian"]
    assert torch.equal(got["o"]["hessian"], other)
