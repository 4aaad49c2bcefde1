from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from resident import Resident

from gblm.calibrate import activations
from gblm.calibrate.stats import STATS
from gblm.calibrate.walk import DecoderLayer, Walk
from gblm.calibrate.walk import walk as walk_layers
from gblm.errors import InputError
from gblm.model.linears import linears
from gblm.model.loading import load

NEEDS = frozenset({"act_norm"})


def walk(
    model: torch.nn.Module, batches: list[torch.Tensor], needs: frozenset[str], **how: object
) -> Iterator[DecoderLayer]:
    return walk_layers(Resident(model), batches, Walk(needs, **how))


@pytest.fixture
def model(tiny: Path) -> torch.nn.Module:
    return load(tiny, torch.float32)


BATCHES = list(torch.randint(256, (3, 1, 16), generator=torch.Generator().manual_seed(0)))


def inputs_by_hooks(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Oracle: ‖X_j‖ from plain forward hooks over whole-model passes."""
    sums: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:

            def hook(module: torch.nn.Module, args: tuple, name: str = name) -> None:
                square = args[0].float().square().reshape(-1, args[0].shape[-1]).sum(0)
                sums[name] = sums.get(name, 0) + square

            handles.append(module.register_forward_pre_hook(hook))
    with torch.no_grad():
        for batch in BATCHES:
            model(input_ids=batch)
    for handle in handles:
        handle.remove()
    return {name: (total / len(BATCHES)).sqrt() for name, total in sums.items()}


@pytest.mark.parametrize("order", ["layer", "sequential"])
def test_shrinkage_weakens_correlations_and_nothing_else(
    model: torch.nn.Module, order: str
) -> None:
    def hessians(shrinkage: float) -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        how = {"order": order, "shrinkage": shrinkage}
        for layer in walk(model, [torch.cat(BATCHES)], NEEDS | {"hessian"}, **how):
            layer.visit(lambda local, stats: found.update({local: stats["hessian"].clone()}))
        return found

    plain, shrunk = hessians(0.0), hessians(0.25)
    assert plain.keys() == shrunk.keys() == linears(model.model.layers[0]).keys()
    for local, hessian in plain.items():
        want = torch.where(torch.eye(len(hessian), dtype=torch.bool), hessian, 0.75 * hessian)
        torch.testing.assert_close(shrunk[local], want)
        assert hessian.diagonal().min() > 0
        assert not torch.equal(hessian, want)


def test_walk_without_changes_sees_the_whole_models_activations(model: torch.nn.Module) -> None:
    want = inputs_by_hooks(model)
    seen = 0
    for layer in walk(model, BATCHES, NEEDS):
        for local, stats in layer.observe().items():
            torch.testing.assert_close(stats["act_norm"], want[f"{layer.name}.{local}"])
            seen += 1
    assert seen == len(want) == 14


def test_walk_propagates_the_changed_weights(model: torch.nn.Module) -> None:
    dense = [
        layer.observe()["self_attn.q_proj"]["act_norm"] for layer in walk(model, BATCHES, NEEDS)
    ]
    changed = []
    for layer in walk(model, BATCHES, NEEDS):
        changed.append(layer.observe()["self_attn.q_proj"]["act_norm"])
        with torch.no_grad():
            layer.linears["mlp.down_proj"].weight.mul_(0)
    assert torch.equal(changed[0], dense[0])
    assert not torch.allclose(changed[1], dense[1])
    # The second layer's statistics are those of a model whose first layer is changed.
    torch.testing.assert_close(
        changed[1], inputs_by_hooks(model)["model.layers.1.self_attn.q_proj"]
    )


def test_activations_on_disk_are_the_same(
    model: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = [layer.observe() for layer in walk(model, BATCHES, NEEDS)]
    monkeypatch.setattr(activations, "MEMORY_SHARE", 0)
    disk = []
    for layer in walk(model, BATCHES, NEEDS, scratch=tmp_path / "s"):
        disk.append(layer.observe())
        assert len(list((tmp_path / "s").iterdir())) == 3
    for a, b in zip(memory, disk, strict=True):
        assert all(torch.equal(a[n]["act_norm"], b[n]["act_norm"]) for n in a)
    assert not list((tmp_path / "s").iterdir())


def test_sequential_order_sees_what_was_pruned_before_in_the_same_layer(
    model: torch.nn.Module,
) -> None:
    """The oracle: statistics of a plain pass, taken when all linears before are zeroed."""
    seen: dict[str, torch.Tensor] = {}
    norms = inputs_by_hooks(model)

    def halve(layer: DecoderLayer, local: str, stats: dict[str, torch.Tensor]) -> None:
        seen[f"{layer.name}.{local}"] = stats["act_norm"]
        layer.linears[local].weight.mul_(0.5)

    names = []
    for layer in walk(model, [torch.cat(BATCHES)], NEEDS, order="sequential"):
        layer.visit(partial(halve, layer))
        names += [f"{layer.name}.{local}" for local in layer.linears]
    assert list(seen) == names
    first = "model.layers.0.self_attn."
    torch.testing.assert_close(seen[first + "q_proj"], norms[first + "q_proj"])
    # Values are halved before o_proj sees them; scores are quartered, so only about so.
    assert not torch.allclose(seen[first + "o_proj"], norms[first + "o_proj"])
    pruned = inputs_by_hooks(model)
    for name, norm in seen.items():
        torch.testing.assert_close(norm, pruned[name])


@pytest.mark.parametrize("order", ["layer", "sequential"])
def test_ranks_join_statistics_in_one_order(model: torch.nn.Module, order: str) -> None:
    """A set of names has another order in every process, in which ranks would wait for another."""
    needs, seen = frozenset(STATS), []
    how = Walk(needs, order=order)
    for layer in walk_layers(Resident(model), [torch.cat(BATCHES)], how):
        layer.visit(lambda local, own: seen.append(list(own)))
    assert seen == [sorted(needs)] * 14


def test_walk_without_needs_runs_no_forward_pass(model: torch.nn.Module) -> None:
    model.model.forward = None
    assert [layer.index for layer in walk(model, [], frozenset())] == [0, 1]


def test_walk_leaves_no_hooks_behind(model: torch.nn.Module) -> None:
    for layer in walk(model, BATCHES, NEEDS):
        layer.observe()
        break
    for layer in walk(model, BATCHES, NEEDS):
        layer.observe()
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_infinite_activations_name_the_linear(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] = float("inf")
    first = next(walk(model, BATCHES, NEEDS))
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj"):
        first.observe()
