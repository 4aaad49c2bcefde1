"""Predictions of a run: from shapes alone, in the right direction, and like a real run on disk."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, save_tiny_model
from safetensors.torch import load_file
from test_resume import cut_off

from gblm.errors import GblmError, UsageError
from gblm.methods import METHODS
from gblm.model.folder import ModelFolder
from gblm.model.reader import Reader
from gblm.plan import plan
from gblm.plan.rates import Rates, strip_shape
from gblm.prune import Output, prune
from gblm.recipe import Calibration, Choice, Recipe
from gblm.sparse.formats import format_for
from gblm.sparse.patterns import parse

Run = Callable[..., Outcome]
TEXT = Calibration(num_samples=4, seq_len=32)


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gblm.plan.rates.PROBE_SECONDS", 0.001)


def predict(model: Path, method: str = "gblm", ranks: int = 1, **fields: Any) -> dict[str, Any]:
    return plan(
        Recipe(**{"model": str(model), "method": method, "calibration": TEXT} | fields), ranks
    )


def working_bytes(facts: dict[str, Any]) -> int:
    """Peak without what every Python process with torch has."""
    base = "interpreter and libraries"
    return max(phase["ram_bytes"] - phase["ram_terms"][base] for phase in facts["phases"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "0.5"])
def test_no_weight_is_read_and_no_layer_run(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, method: str, pattern: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Reader, "tensor", fail)
    monkeypatch.setattr(torch.nn.Module, "__call__", fail)
    facts = predict(tiny, method, pattern=pattern)
    json.dumps(facts)
    phases = [phase["phase"] for phase in facts["phases"]]
    wanted = {"magnitude": [], "gradient": ["gradients"], "gblm": ["gradients", "capture"]}
    assert phases == [*wanted.get(method, ["capture"]), "pruning", "publishing"]
    assert facts["ram_bytes"] == max(phase["ram_bytes"] for phase in facts["phases"])
    for phase in facts["phases"]:
        assert phase["ram_bytes"] == sum(phase["ram_terms"].values())
    spent = sum(phase["seconds"] for phase in facts["phases"]) + facts["start_seconds"]
    assert facts["seconds"] == pytest.approx(spent, abs=0.5)
    assert facts["gpu_bytes"] == 0


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps", "gblm"])
def test_more_work_takes_more(tiny: Path, tmp_path: Path, method: str) -> None:
    small = predict(tiny, method)
    longer = predict(tiny, method, calibration=TEXT.model_copy(update={"seq_len": 4096}))
    more = predict(tiny, method, calibration=TEXT.model_copy(update={"num_samples": 4096}))
    big = save_tiny_model(tmp_path / "big", hidden_size=512, intermediate_size=2048)
    large = predict(big, method)
    for other in (longer, more, large):
        assert working_bytes(other) > working_bytes(small)
    assert large["disk"]["peak_bytes"] > 10 * small["disk"]["peak_bytes"]
    assert more["seconds"] > small["seconds"]


def test_ranks_share_the_samples(tiny: Path) -> None:
    text = TEXT.model_copy(update={"num_samples": 8192})
    assert working_bytes(predict(tiny, calibration=text, ranks=8)) < working_bytes(
        predict(tiny, calibration=text)
    )


def test_activations_go_to_disk_when_memory_is_short(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert predict(tiny)["disk"]["activations_bytes"] == 0
    monkeypatch.setattr("gblm.calibrate.activations.MEMORY_SHARE", 0)
    layers, hidden, width = 2, 64, 2
    inputs = TEXT.num_samples * TEXT.seq_len * hidden * width
    assert predict(tiny, "wanda")["disk"]["activations_bytes"] == inputs
    assert predict(tiny)["disk"]["activations_bytes"] == (layers + 2) * inputs


@pytest.mark.parametrize("values", ["float", "int8", "int4"])
@pytest.mark.parametrize("pattern", ["2:4", "0.5", "dense"])
def test_the_output_is_as_large_as_predicted(
    tiny: Path, pack_tiny: Callable[..., Path], pattern: str, values: str
) -> None:
    found = sum(file.stat().st_size for file in pack_tiny("wanda", pattern, values).iterdir())
    wanted = predict(tiny, "wanda", pattern=pattern, values=values)["disk"]
    assert wanted["output_bytes"] == pytest.approx(found, rel=0.05)
    assert wanted["peak_bytes"] == wanted["output_bytes"] + wanted["finished_layers_bytes"]


@pytest.mark.parametrize("head", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_head_is_counted(
    tiny: Path, tiny_untied: Path, pack_tiny: Callable[..., Path], tied: bool, head: str
) -> None:
    source, folder = tiny if tied else tiny_untied, pack_tiny(head=head, tied=tied)
    found = sum(file.stat().st_size for file in folder.iterdir())
    facts, plain = predict(source, "wanda", head=head), predict(source, "wanda")
    assert facts["head"] == f"{head}:64"
    assert facts["disk"]["output_bytes"] == pytest.approx(found, rel=0.02)
    grows = facts["disk"]["output_bytes"] > plain["disk"]["output_bytes"]
    assert grows is tied
    assert working_bytes(facts) >= working_bytes(plain)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_codes_take_memory_and_save_disk(tiny: Path, method: str) -> None:
    floats, codes = (predict(tiny, method, dtype="float32", values=v) for v in ("float", "int8"))
    assert working_bytes(codes) >= working_bytes(floats)
    assert codes["disk"]["peak_bytes"] < floats["disk"]["peak_bytes"]
    assert codes["seconds"] is not None


def test_gradient_norms_take_four_bytes_per_weight(tiny: Path) -> None:
    with Reader(ModelFolder.open(tiny)) as reader:
        names = [name for name in reader if "proj" in name]
        weights = sum(reader.num_bytes(name) // 2 for name in names)
    assert predict(tiny)["disk"]["gradient_norms_bytes"] == 4 * weights


def test_a_gpu_that_is_not_there_can_be_planned_for(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    facts = predict(tiny, device="cuda")
    assert facts["seconds"] is None
    assert facts["gpu_bytes"] > 0


@pytest.mark.parametrize("pattern", ["2:4", "5:12", "0.5"])
def test_every_pattern_can_be_probed(pattern: str) -> None:
    shape = strip_shape(parse(pattern), 128)
    format_for(parse(pattern)).check_shape("probe", shape)


def test_sequential_order_holds_all_samples_at_once(tiny: Path) -> None:
    text = TEXT.model_copy(update={"num_samples": 512, "order": "sequential"})
    whole = predict(tiny, "sparsegpt", calibration=text.model_copy(update={"order": "layer"}))
    once = predict(tiny, "sparsegpt", calibration=text)
    assert working_bytes(once) > working_bytes(whole)  # all samples in one batch


STEPS: list[dict[str, Any]] = [
    {"refit": {}},
    {"rounding": "obs", "values": "int4"},
    {"reconstruct": {"epochs": 1}},
    {"refit": {}, "rounding": "obs", "values": "int4", "reconstruct": {"epochs": 1}},
]


@pytest.mark.parametrize("fields", STEPS, ids=str)
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_steps_take_memory_and_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, fields: dict[str, Any]
) -> None:
    same = defaultdict[Choice, float](lambda: 1e8)
    rates = Rates(*[1e9] * 6, same, same, same, 1e9)
    monkeypatch.setattr("gblm.plan.probe", lambda *arguments: rates)
    big = save_tiny_model(tmp_path / "big", hidden_size=512, intermediate_size=2048)
    plain = predict(big, method, values=fields.get("values", "float"))
    facts = predict(big, method, **fields)
    if method == "sparsegpt" and fields.keys() == {"rounding", "values"}:
        # In the same sweep, with the same factor.
        assert working_bytes(facts) >= working_bytes(plain)
        assert facts["seconds"] == plain["seconds"]
    else:
        assert working_bytes(facts) > working_bytes(plain)
        assert facts["seconds"] > plain["seconds"]
    assert "capture" in [phase["phase"] for phase in facts["phases"]]


@pytest.mark.parametrize("order", ["layer", "sequential"])
def test_a_second_stream_goes_to_disk_too(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    monkeypatch.setattr("gblm.calibrate.activations.MEMORY_SHARE", 0)
    text = TEXT.model_copy(update={"order": order})
    one, two = (predict(tiny, "wanda", calibration=text, reconstruct=r) for r in (None, {}))
    assert two["disk"]["activations_bytes"] == 2 * one["disk"]["activations_bytes"] > 0


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("fields", STEPS, ids=str)
def test_finished_layers_are_as_large_as_predicted(
    tiny: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    dtype: str,
) -> None:
    calibration = TEXT.model_copy(update={"source": str(text_file)})
    base = Recipe(model=str(tiny), method="wanda", dtype=dtype, calibration=calibration)
    recipe = Recipe.from_dict(base.to_dict() | fields)
    cut_off(recipe, tmp_path / "out", monkeypatch)
    (layer,) = tmp_path.glob(".out.work/layer-*.safetensors")
    found = sum(tensor.nbytes for tensor in load_file(layer).values())
    assert plan(recipe)["disk"]["finished_layers_bytes"] == 2 * found


def test_steps_need_no_method_for_the_dense_pattern(tiny: Path) -> None:
    predict(tiny, "sparsegpt", pattern="dense", values="int4", rounding="obs")
    mixed = [{"targets": ["*.0.*"], "pattern": "dense", "values": "int8"}]
    groups = predict(tiny, "sparsegpt", layers=mixed, rounding="obs")["groups"]
    assert [group["pattern"] for group in groups] == ["dense", "dense", "2:4"]


def test_layers_that_stay_dense_are_planned_for(tiny: Path) -> None:
    facts = predict(tiny, "wanda", ignore=("layers.0.*",), reconstruct={})
    assert facts["groups"][0]["linears"] == 7


REFUSED: list[dict[str, Any]] = [
    {"pattern": "2:5"},
    {"ignore": ["zzz"]},
    {"method": "nope"},
    {"method": "sparsegpt", "options": {"damping": 2.0}},
    {"layers": [{"targets": ["q_proj"], "values": "int8"}]},
    {"values": "int4:256"},
    {"method": "wanda", "calibration": None},
    {"method": "magnitude", "refit": {}, "calibration": None},
    {"method": "magnitude", "rounding": "obs", "values": "int8", "calibration": None},
    {"method": "wanda", "stats": "nowhere"},
    {"method": "wanda", "pattern": "dense", "refit": {}},
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_what_prune_refuses_is_refused(tiny: Path, tmp_path: Path, fields: dict[str, Any]) -> None:
    recipe = Recipe.from_dict({"model": str(tiny)} | fields)
    with pytest.raises(GblmError) as by_prune:
        prune(recipe, tmp_path / "out")
    with pytest.raises(type(by_prune.value)) as by_plan:
        plan(recipe)
    assert str(by_plan.value) == str(by_prune.value)


def test_statistics_without_what_steps_need_are_refused(
    tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    calibration = TEXT.model_copy(update={"source": str(text_file), "prefix": "dense"})
    recipe = Recipe(model=str(tiny), method="wanda", calibration=calibration)
    prune(recipe, Output(tmp_path / "first", save_stats=tmp_path / "stats"))
    recipe = recipe.model_copy(update={"stats": str(tmp_path / "stats"), "calibration": None})
    plan(recipe)
    more = Recipe.from_dict(recipe.to_dict() | {"refit": {}})
    for run in (plan, partial(prune, output=tmp_path / "second")):
        with pytest.raises(UsageError, match="lacks hessian"):
            run(more)


def test_more_ranks_than_samples_are_refused(tiny: Path) -> None:
    predict(tiny, "wanda", ranks=4)
    with pytest.raises(UsageError, match="5 ranks cannot share 4 samples"):
        predict(tiny, "wanda", ranks=5)
    text = TEXT.model_copy(update={"batch_size": 2})
    with pytest.raises(UsageError, match="3 ranks cannot share 4 samples"):
        predict(tiny, "wanda", ranks=3, calibration=text)
    predict(tiny, "magnitude", ranks=5)


def test_command_prints_a_table_or_json(gblm: Run, tiny: Path, tmp_path: Path) -> None:
    done = gblm("plan", tiny, "--method", "gblm", "--num-samples", 4, "--seq-len", 32)
    assert done.code == 0, done
    lines = done.out.splitlines()
    assert lines[0].split() == ["phase", "peak", "RAM", "time", "peak", "at"]
    for word in ("start", "gradients", "capture", "pruning", "publishing", "in all", "disk:"):
        assert any(line.startswith(word) for line in lines), word
    done = gblm("plan", tiny, "--method", "magnitude", "--ranks", 2, "--json")
    facts = json.loads(done.out)
    assert facts["ranks"] == 2
    assert not list(tmp_path.glob("*"))
