"""Training a pruned decoder layer towards the dense one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from resident import Resident

from gblm.calibrate import activations
from gblm.calibrate.activations import Activations
from gblm.calibrate.ranks import ALONE, Ranks
from gblm.calibrate.reconstruct import reconstruct
from gblm.calibrate.walk import DecoderLayer, Walk, walk
from gblm.errors import InputError
from gblm.model.loading import load
from gblm.recipe import Reconstruction
from gblm.sparse.patterns import NM
from gblm.sparse.values import parse_values, quantize
from gblm.sparse.weights import SparseWeight

HOW = Reconstruction(epochs=4, learning_rate=0.03, batch_size=2)


BATCHES = list(torch.randint(256, (3, 2, 16), generator=torch.Generator().manual_seed(0)))


def cut(weight: torch.Tensor) -> SparseWeight:
    return SparseWeight.cut(weight.detach().clone(), NM(2, 4).keep(weight.abs(), "row"))


def rounded(weight: torch.Tensor) -> SparseWeight:
    pruned = cut(weight)
    return quantize(pruned.weight, pruned.mask, parse_values("int4:32"))


def pruned_layer(
    tiny: Path, make: object = cut, dtype: torch.dtype = torch.float32,
    batches: list[torch.Tensor] = BATCHES, scratch: Path | None = None,
) -> tuple[DecoderLayer, dict[str, SparseWeight]]:  # fmt: skip
    """The first decoder layer, its linears pruned in place, with its streams."""
    how = Walk(frozenset(), keep_dense=True, scratch=scratch)
    layer = next(walk(Resident(load(tiny, dtype)), batches, how))
    weights = {name: make(linear.weight) for name, linear in layer.linears.items()}
    with torch.no_grad():
        for name, weight in weights.items():
            layer.linears[name].weight.copy_(weight.weight)
    return layer, weights


def loss(layer: DecoderLayer) -> float:
    """Oracle: the loss of the module as it is, sample after sample."""
    assert layer.streams is not None
    total = 0.0
    with torch.no_grad():
        for pick in range(layer.streams.num_samples):
            inputs, targets = layer.streams.batch([pick])
            error = layer.streams.run(layer.module, inputs) - targets
            total += float((error.square().sum(-1) / targets.square().sum(-1)).mean())
    return total / layer.streams.num_samples


@pytest.mark.parametrize(("make", "share"), [(cut, 0.9), (rounded, 0.97)])
def test_training_brings_the_layer_closer_to_the_dense_one(
    tiny: Path, make: object, share: float
) -> None:
    layer, weights = pruned_layer(tiny, make)
    before, kept = loss(layer), {n: p.clone() for n, p in layer.module.named_parameters()}
    done = reconstruct(layer.module, weights, layer.streams, HOW, ALONE, "layer")
    for name, parameter in layer.module.named_parameters():
        assert torch.equal(parameter, kept[name]), "the module itself must not be trained"
    for name, weight in done.weights.items():
        layer.linears[name].weight.data.copy_(weight.weight)
        assert torch.equal(weight.mask, weights[name].mask)
        assert not bool(weight.weight[~weight.mask].any())
    for name, tensor in done.others.items():
        layer.module.get_parameter(name).data.copy_(tensor)
    assert loss(layer) < share * before
    assert done.others.keys() == {"input_layernorm.weight", "post_attention_layernorm.weight"}
    assert done.loss[0] > done.loss[1]


def test_trained_codes_stay_codes(tiny: Path) -> None:
    layer, weights = pruned_layer(tiny, rounded)
    how = Reconstruction(epochs=8, learning_rate=0.2, batch_size=1)
    done = reconstruct(layer.module, weights, layer.streams, how, ALONE, "layer")
    changed = 0
    for name, weight in done.weights.items():
        assert weight.codes is not None
        assert weight.scales is not None
        assert int(weight.codes.abs().max()) <= 7
        assert bool((weight.scales > 0).all())
        again = SparseWeight.from_codes(weight.codes, weight.scales, weight.mask, torch.float32)
        assert torch.equal(again.weight, weight.weight)
        changed += int((weight.codes.float() != weights[name].codes.float()).sum())
    assert changed > 0


def test_the_dense_stream_does_not_see_changes(tiny: Path) -> None:
    model = load(tiny, torch.float32)
    with torch.no_grad():
        states = [model(input_ids=b, output_hidden_states=True).hidden_states for b in BATCHES]
    first, second = (torch.cat([states[0][i][:1], states[1][i][1:]]) for i in (0, 1))
    steps = walk(Resident(model), BATCHES, Walk(frozenset(), keep_dense=True))
    layer = next(steps)
    inputs, targets = layer.streams.batch([0, 3])
    assert torch.allclose(inputs, first, atol=1e-5)
    assert torch.allclose(targets, second, atol=1e-5)
    for linear in layer.linears.values():
        linear.weight.data.zero_()
    layer = next(steps)
    inputs, targets = layer.streams.batch([0, 3])
    assert torch.allclose(inputs, first, atol=1e-5), "layers of zeros pass their inputs on"
    want = layer.streams.run(layer.module, second)
    assert torch.allclose(targets, want, atol=1e-5)


def test_a_loss_that_is_not_finite_is_an_error(tiny: Path) -> None:
    layer, weights = pruned_layer(tiny)
    how = Reconstruction(epochs=2, learning_rate=0.9, batch_size=1)
    weights["mlp.down_proj"].weight.fill_(float("inf"))
    with pytest.raises(InputError, match="did not converge"):
        reconstruct(layer.module, weights, layer.streams, how, ALONE, "layer")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_train_as_well(tiny: Path, dtype: torch.dtype) -> None:
    wide, weights = pruned_layer(tiny)
    want = reconstruct(wide.module, weights, wide.streams, HOW, ALONE, "layer")
    layer, weights = pruned_layer(tiny, dtype=dtype)
    done = reconstruct(layer.module, weights, layer.streams, HOW, ALONE, "layer")
    assert done.loss == pytest.approx(want.loss, rel=0.05)
    for name, weight in done.weights.items():
        assert weight.weight.dtype == dtype
        moved = want.weights[name].weight - weights[name].weight.float()
        error = weight.weight.float() - want.weights[name].weight
        assert float(error.norm()) < 0.6 * float(moved.norm()), name


def test_gradients_too_small_for_float16_count(tiny: Path) -> None:
    """Many tokens of large states: each gradient of the mean is below float16's smallest number."""
    batches = list(torch.randint(256, (2, 4, 512), generator=torch.Generator().manual_seed(0)))
    layer, weights = pruned_layer(tiny, dtype=torch.float16, batches=batches)
    assert layer.streams is not None
    for held in (layer.streams.inputs, layer.streams.targets):
        for index in range(len(batches)):
            states = held.get(index, torch.device("cpu"))
            held[index] = states.float().mul(1000.0).half()
    done = reconstruct(
        layer.module, weights, layer.streams, Reconstruction(epochs=1), ALONE, "layer"
    )
    for name in ("mlp.down_proj", "self_attn.o_proj"):
        before, after = weights[name].weight, done.weights[name].weight
        changed = (before != after)[weights[name].mask].float().mean()
        assert float(changed) > 0.9, name


def test_linears_that_no_sample_reaches_are_no_obstacle(tiny: Path) -> None:
    class Two(Ranks):
        def average_(self, tensor: torch.Tensor) -> None:
            assert isinstance(tensor, torch.Tensor), "the other rank waits for this one"

    layer, weights = pruned_layer(tiny)
    layer.module.expert = torch.nn.Linear(64, 64)
    weights["expert"] = cut(layer.module.expert.weight)
    done = reconstruct(layer.module, weights, layer.streams, HOW, Two(), "layer")
    assert torch.equal(done.weights["expert"].weight, weights["expert"].weight)
    assert done.loss[1] < done.loss[0]


def test_a_step_reads_its_own_samples_only(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "MEMORY_SHARE", 0)
    one = torch.cat(BATCHES).split(len(BATCHES) * 2)  # as in the sequential order
    layer, _ = pruned_layer(tiny, batches=list(one), scratch=tmp_path)
    assert layer.streams is not None
    want = [
        held.get(0, torch.device("cpu")) for held in (layer.streams.inputs, layer.streams.targets)
    ]
    monkeypatch.setattr(Activations, "get", lambda *arguments: pytest.fail("all samples were read"))
    found = layer.streams.batch([4, 1])
    for tensor, whole in zip(found, want, strict=True):
        assert torch.equal(tensor, whole[[4, 1]])
