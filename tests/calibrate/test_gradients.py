from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gblm.calibrate.gradients import gradient_norms
from gblm.errors import InputError, UsageError
from gblm.model import load, prunable


@pytest.fixture
def model(tiny: Path) -> torch.nn.Module:
    return load(tiny, torch.float32)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_gradient_norms_equal_autograd(model: torch.nn.Module, norm: str) -> None:
    samples = list(torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(0)))
    linears = prunable(model)
    before = {name: linear.weight.clone() for name, linear in linears.items()}
    got = gradient_norms(model, samples, linears, norm)
    name = "model.layers.1.mlp.gate_proj"
    weight = linears[name].weight
    grads = []
    for sample in samples:
        ids = sample.unsqueeze(0)
        logits = model(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        grads.append(torch.autograd.grad(loss, weight)[0])
    stack = torch.stack(grads)
    want = stack.abs().sum(0) if norm == "l1" else stack.square().sum(0).sqrt()
    torch.testing.assert_close(got[name], want)
    assert all(torch.equal(before[n], linear.weight) for n, linear in linears.items())


def test_no_gradients_or_hooks_are_left(model: torch.nn.Module) -> None:
    flags = [p.requires_grad for p in model.parameters()]
    gradient_norms(model, [torch.arange(8)], prunable(model), "l2")
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == flags


def test_infinite_loss_is_refused(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule("model.norm").weight.fill_(float("nan"))
    with pytest.raises(InputError, match="sample 0: the loss is nan"):
        gradient_norms(model, [torch.arange(8)], prunable(model), "l2")


def test_unknown_norm_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(UsageError):
        gradient_norms(model, [], prunable(model), "l3")
