from __future__ import annotations

from pathlib import Path

import pytest
import torch
from resident import Resident

from gblm.calibrate import activations
from gblm.calibrate.gradients import gradient_norms as norms_by_layer
from gblm.errors import InputError, UsageError
from gblm.model.linears import prunable
from gblm.model.loading import load


def gradient_norms(
    model: torch.nn.Module,
    samples: list[torch.Tensor],
    linears: dict[str, torch.nn.Linear],
    norm: str,
    scratch: Path | None = None,
) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for _, norms in norms_by_layer(Resident(model), samples, linears, norm, scratch=scratch):
        found |= norms
    return found


@pytest.fixture
def model(tiny: Path) -> torch.nn.Module:
    return load(tiny, torch.float32)


@pytest.fixture
def samples() -> list[torch.Tensor]:
    return list(torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("norm", ["l1", "l2", "output"])
@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.gate_proj"]
)
def test_gradient_norms_equal_autograd(
    model: torch.nn.Module,
    samples: list[torch.Tensor],
    norm: str,
    name: str,
) -> None:
    linears = prunable(model)
    before = {name: linear.weight.clone() for name, linear in linears.items()}
    got = gradient_norms(model, samples, linears, norm)
    assert got.keys() == linears.keys()
    weight, outputs, grads = linears[name].weight.requires_grad_(True), [], []
    linears[name].register_forward_hook(lambda module, args, output: outputs.append(output))
    for sample in samples:
        ids = sample.unsqueeze(0)
        logits = model(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        of = outputs.pop() if norm == "output" else weight
        grads.append(torch.autograd.grad(loss, of)[0])
    stack = torch.stack(grads)
    if norm == "output":
        want = stack.square().sum(dim=(0, 1, 2))
        torch.testing.assert_close(got[name], want, rtol=1e-3, atol=1e-12)
    else:
        want = stack.abs().sum(0) if norm == "l1" else stack.square().sum(0).sqrt()
        torch.testing.assert_close(got[name], want)
    assert all(torch.equal(before[n], linear.weight) for n, linear in linears.items())


def test_inputs_on_disk_give_the_same(
    model: torch.nn.Module,
    samples: list[torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = gradient_norms(model, samples, prunable(model), "l2")
    monkeypatch.setattr(activations, "MEMORY_SHARE", 0)
    disk = gradient_norms(model, samples, prunable(model), "l2", tmp_path)
    assert all(torch.equal(memory[name], disk[name]) for name in memory)


def test_half_precision_keeps_small_gradients(tiny: Path, samples: list[torch.Tensor]) -> None:
    """Gradients of 1e-9 and less round to zero in float16 unless they are scaled."""
    full, half = load(tiny, torch.float32), load(tiny, torch.float16)
    for model in (full, half):
        with torch.no_grad():
            model.get_submodule("model.norm").weight.mul_(1e-4)
    want = gradient_norms(full, samples, prunable(full), "l2")
    got = gradient_norms(half, samples, prunable(half), "l2")
    for name, norm in want.items():
        assert float(got[name].mean()) == pytest.approx(float(norm.mean()), rel=0.1), name
        assert float((got[name] == 0).float().mean()) < 0.05, name


def test_no_gradients_or_hooks_are_left(model: torch.nn.Module) -> None:
    gradient_norms(model, [torch.arange(8)], prunable(model), "l2")
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


def test_infinite_loss_is_refused(model: torch.nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule("model.norm").weight.fill_(float("nan"))
    with pytest.raises(InputError, match="sample 0: the loss is nan"):
        gradient_norms(model, [torch.arange(8)], prunable(model), "l2")


def test_unknown_norm_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(UsageError):
        gradient_norms(model, [], prunable(model), "l3")
