"""Packed folders in transformers: the same logits as the pruned dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from alike import NEEDS_KERNELS, exported, logits
from conftest import Pack
from damage import config
from test_families import save_family

import gblm.packed
from gblm.checkpoint.inspect import verify
from gblm.errors import CheckpointError, InputError
from gblm.kernels import BACKENDS, log_choice
from gblm.model import experts
from gblm.model.folder import ModelFolder
from gblm.prune import prune
from gblm.recipe import Recipe


@pytest.mark.parametrize(
    ("pattern", "values", "head", "tied"),
    [("2:4", "float", "float", True), ("2:4", "int8", "int8", True),
     ("2:4", "int4:32", "int4", False), ("0.5", "float", "int8", False),
     ("0.5", "int8:row", "float", True), ("0.5", "int4", "int4", True),
     ("dense", "float", "float", True), ("dense", "int8", "int8", False),
     ("dense", "int4:64", "float", True)],
)  # fmt: skip
def test_logits_equal_the_dense_export(
    pack_tiny: Pack, best_backend: str, tmp_path: Path, pattern: str, values: str, head: str,
    tied: bool,
) -> None:  # fmt: skip
    folder = pack_tiny("wanda", pattern, values, head, tied)
    assert verify(ModelFolder.open(folder))["linears"] == 14 + (head != "float")
    want, best = exported(folder, tmp_path / "dense"), gblm.packed.load(folder)
    assert best.get_submodule("model.layers.0.mlp.up_proj").backend.name == best_backend
    assert (type(best.lm_head).__name__ == "SparseLinear") == (head != "float")
    # cpu rounds activations to int8 where it meets codes.
    assert (logits(best) - want).float().norm() < 0.08 * want.float().norm()


@pytest.mark.parametrize("family", ["llama 1/2", "llava"])
def test_every_tensor_has_the_dtype_that_is_asked_for(family: str, tmp_path: Path) -> None:
    source = save_family(family, tmp_path / "model")
    recipe = Recipe(model=str(source), method="magnitude", calibration=None, head="int8")
    prune(recipe, tmp_path / "out")
    model = gblm.packed.load(tmp_path / "out", "dense", torch.float32)
    found = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    assert {dtype for dtype in found if dtype.is_floating_point} == {torch.float32}


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
        "gblm: 1 linears run on backend dense (expanded at load): memory is the dense model's; "
        "refused: cpu: odd",
    ]


@NEEDS_KERNELS
@pytest.mark.parametrize(("family", "chosen"), [("mixtral", 2), ("llama 4 text (fused)", 1)])
def test_all_experts_of_a_layer_are_one_call(family: str, chosen: int, tmp_path: Path) -> None:
    source = save_family(family, tmp_path / "model", num_experts_per_tok=chosen)
    recipe = Recipe(model=str(source), method="magnitude", pattern="2:4", calibration=None)
    prune(recipe, tmp_path / "out")
    model = gblm.packed.load(tmp_path / "out", "cpu")
    found = experts.blocks(model)
    assert len(found) == 2
    for _, block in found:
        inputs = routed(block)
        assert block.grouped is not None
        got = block(*inputs)
        block.grouped = None
        alone = block(*inputs)
        assert (got.float() - alone.float()).norm() < 0.01 * alone.float().norm()
        # Their panels are not held twice.
        linears = [part for part in block.modules() if isinstance(part, gblm.packed.SparseLinear)]
        assert len(linears) == 3 * len(block)
        assert len({part.prepared[0].untyped_storage().data_ptr() for part in linears}) == 1
    assert all(
        block.grouped is None
        for _, block in experts.blocks(gblm.packed.load(tmp_path / "out", "reference"))
    )


def routed(block: Any) -> tuple[torch.Tensor, ...]:
    """What transformers hands to the experts of 9 tokens; Llama 4 weighs inputs, zeros included."""
    seed = torch.Generator().manual_seed(0)
    hidden = torch.randn(9, 64, generator=seed).bfloat16()
    ids = torch.rand(9, len(block), generator=seed).argsort(1)
    shares = torch.rand(9, len(block), generator=seed).bfloat16()
    if isinstance(block, experts.WeightedExperts):
        own = ids[:, 0] == torch.arange(len(block))[:, None]
        return ((hidden * shares[:, 0, None] * own[..., None]).reshape(-1, 64),)
    return hidden, ids[:, :2], shares[:, :2]
