"""Tests that need a GPU, on the emulated one: their Python is right before a card is there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import test_gpu as wanted
import torch
from gpu_emulated import emulated_backends, missing
from torch import Tensor

from gblm.kernels import BACKENDS, Backend
from gblm.sparse.formats import Format, Shape

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))
CASES = [case for case in wanted.GPU_CASES if case[0] in ("mma_sp", "delta") and case[2][0] < 512]


@pytest.fixture(autouse=True)
def emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, backend in emulated_backends().items():
        monkeypatch.setitem(BACKENDS, name, backend)
    monkeypatch.setattr(wanted, "CUDA", torch.device("cpu"))
    monkeypatch.setattr(wanted, "TOKENS", (9, 65))
    yield
    torch.set_deterministic_debug_mode("default")


@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_the_list_runs_and_is_met(case: tuple[str, str, Shape, torch.dtype]) -> None:
    wanted.test_products_equal_float64(*case)
    wanted.test_the_expanded_weight_is_that_of_the_format(*case)


@pytest.mark.parametrize("fault", ["last row missing", "one percent off"])
def test_the_list_sees_a_wrong_product(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    class Broken(type(BACKENDS["delta"])):  # type: ignore[misc]
        def multiply(
            self, x: Tensor, out: Tensor, prepared: list[Tensor], fmt: Format, shape: Shape
        ) -> None:
            whole = torch.empty_like(out)
            super().multiply(x, whole, prepared, fmt, shape)
            if fault == "last row missing":
                out[:, :-1] = whole[:, :-1]
            else:
                out.copy_(whole * 1.01)

    good = BACKENDS["delta"]
    broken: Backend = Broken(good._device_of)
    monkeypatch.setitem(BACKENDS, "delta", broken)
    monkeypatch.setattr(wanted, "TOKENS", (2,))
    with pytest.raises(AssertionError):
        wanted.test_products_equal_float64(*CASES[-1])
