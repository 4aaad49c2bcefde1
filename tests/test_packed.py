"""Packed folders in transformers: the same logits as the pruned dense model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Pack
from damage import config

import gblm.packed
from gblm.checkpoint.inspect import verify
from gblm.errors import CheckpointError, InputError, UsageError
from gblm.export.dense import export_dense
from gblm.kernels import BACKENDS, log_choice
from gblm.model.folder import ModelFolder
from gblm.model.loading import load


@pytest.mark.parametrize(
    ("pattern", "values"),
    [("2:4", "float"), ("2:4", "int8"), ("2:4", "int4:32"), ("0.5", "float"), ("0.5", "int8:row"),
     ("0.5", "int4"), ("dense", "float"), ("dense", "int8"), ("dense", "int4:64")],
)  # fmt: skip
def test_logits_equal_the_dense_export(
    pack_tiny: Pack, tmp_path: Path, pattern: str, values: str
) -> None:
    folder = pack_tiny("wanda", pattern, values)
    export_dense(ModelFolder.open(folder), tmp_path / "dense")
    facts = verify(ModelFolder.open(folder), against=ModelFolder.open(tmp_path / "dense"))
    assert (facts["ok"], facts["linears"]) == (True, 14)
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        want = load(tmp_path / "dense")(input_ids=ids).logits
        for backend in ("reference", "dense"):
            assert torch.equal(gblm.packed.load(folder, backend)(input_ids=ids).logits, want)


@pytest.mark.parametrize("values", ["float", "int8"])
def test_best_backend_serves_when_none_is_asked_for(
    pack_tiny: Pack, best_backend: str, values: str
) -> None:
    folder = pack_tiny("wanda", "2:4", values)
    model, ids = gblm.packed.load(folder), torch.arange(24).reshape(2, 12)
    assert model.get_submodule("model.layers.0.mlp.up_proj").backend.name == best_backend
    with torch.no_grad():
        want = gblm.packed.load(folder, "dense")(input_ids=ids).logits.float()
        got = model(input_ids=ids).logits.float()
    # cpu rounds activations to int8 where it meets codes.
    assert (got - want).norm() < 0.08 * want.norm()


def test_from_pretrained_works_after_one_import(pack_tiny: Pack) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(pack_tiny())
    kinds = {type(m).__name__ for m in model.model.layers.modules()}
    assert "SparseLinear" in kinds
    assert "Linear" not in kinds
    out = model.generate(torch.arange(4).reshape(1, 4), max_new_tokens=3, do_sample=False)
    assert out.shape == (1, 7)


def test_packed_weights_stay_packed_in_memory(pack_tiny: Pack) -> None:
    model = gblm.packed.load(pack_tiny(), "reference")
    linear = model.get_submodule("model.layers.0.mlp.up_proj")
    size = sum(t.numel() * t.element_size() for t in linear.prepared)
    assert size == 128 * 64 * 9 // 8
    assert not [p for p in linear.parameters()]


def test_forced_backend_is_taken_and_logged(
    pack_tiny: Pack, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "gblm")
    gblm.packed.load(pack_tiny(), "dense")
    assert "14 linears run on backend dense (expanded at load)" in caplog.text
    monkeypatch.setenv("GBLM_BACKEND", "dense")
    model = gblm.packed.load(pack_tiny())
    assert model.get_submodule("model.layers.0.mlp.up_proj").backend.name == "dense"


def test_unknown_backend_is_refused(pack_tiny: Pack) -> None:
    with pytest.raises(UsageError, match="'cuda' is unknown"):
        gblm.packed.load(pack_tiny(), "cuda")


def test_dtype_can_be_chosen(pack_tiny: Pack) -> None:
    model = gblm.packed.load(pack_tiny(), dtype=torch.float32)
    assert model(input_ids=torch.arange(4).reshape(1, 4)).logits.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_hidden_layers": "x"}, "num_hidden_layers is 'x', not a whole number"),
        ({"model_type": "nonsense"}, "the model_type 'nonsense', which transformers"),
    ],
)
def test_what_transformers_cannot_build_is_refused(
    packed: Path, change: dict[str, str], message: str
) -> None:
    config(lambda fields: fields.update(change))(packed)
    with pytest.raises(CheckpointError, match=message):
        gblm.packed.load(packed)


def test_dense_folder_is_not_loaded_as_packed(tiny: Path) -> None:
    with pytest.raises(CheckpointError, match="no packed weights"):
        gblm.packed.load(tiny)
    with pytest.raises(InputError, match="--backend applies to packed folders only"):
        gblm.packed.load_any(tiny, "dense")


def test_log_names_for_each_backend_why_better_ones_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="gblm.kernels")
    log_choice([(BACKENDS["cpu"], []), (BACKENDS["dense"], ["cpu: odd"]), (BACKENDS["cpu"], [])])
    assert caplog.messages == [
        "gblm: 2 linears run on backend cpu (packed in memory)",
        "gblm: 1 linears run on backend dense (expanded at load); refused: cpu: odd",
    ]
