"""semi_structured on an emulated GPU: which way serves how many tokens; and PyTorch's operators."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_emulated import EmulatedDevice, emulated, missing
from gpu_place import FakeLibrary
from torch import Tensor

from gblm.errors import UsageError
from gblm.formats import make_format
from gblm.kernels.autotune import Answers, Autotuner
from gblm.kernels.cuda import semi_structured
from gblm.kernels.cuda.libraries import LIBRARIES, CuSparseLt, Cutlass
from gblm.kernels.cuda.semi_structured import SemiStructured, measured_size, plentiful_memory
from gblm.values import quantize
from gblm.weights import SparseWeight

BF16 = torch.bfloat16
SHAPE = (32, 64)
needs_compiler = pytest.mark.skipif(missing() is not None, reason=str(missing()))


class Setting:
    """A backend on the emulated GPU whose ways take as long as a test says."""

    def __init__(self, gpu: EmulatedDevice, folder: Path, **options: Any) -> None:
        self.gpu, self.seconds, self.capturing = gpu, {}, False
        self.tuner = Autotuner(Answers(folder / "a"), ("fake",), self.time, lambda: self.capturing)
        self.backend = SemiStructured(lambda _: gpu, lambda _: self.tuner, **options)
        self.fmt = make_format("nm", "2:4")
        drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(BF16)
        self.weight = SparseWeight.cut(drawn, self.fmt.pattern.keep(drawn.abs().float(), "row"))
        self.parts = self.fmt.pack("w", self.weight)
        self.ran: list[str] = []

    def time(self, call: Callable[[], object]) -> float:
        self.ran = []
        call()
        return self.seconds[self.ran[-1]]

    def spy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        plain, second = SemiStructured._multiply, SemiStructured._by_second

        def multiply(own: SemiStructured, route: str, *rest: Any) -> Tensor:
            self.ran.append(route)
            return plain(own, route, *rest)

        def by_second(own: SemiStructured, name: str, *rest: Any) -> Tensor:
            self.ran.append(name)
            return second(own, name, *rest)

        monkeypatch.setattr(SemiStructured, "_multiply", multiply)
        monkeypatch.setattr(SemiStructured, "_by_second", by_second)

    def check(self, tokens: int, prepared: list[Tensor]) -> None:
        x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
        self.ran, self.gpu.launches[:] = [], []
        got = self.backend.linear(x, prepared, self.fmt, SHAPE)
        want = x.double() @ self.weight.weight.double().t()
        torch.testing.assert_close(got.double(), want, rtol=4e-3, atol=1e-5)


@pytest.fixture
def gpu() -> EmulatedDevice:
    return emulated()


@needs_compiler
@pytest.mark.parametrize("winner", ["tiles", "expand"])
def test_with_one_layout_the_faster_way_serves_more_tokens(
    gpu: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: str
) -> None:
    setting = Setting(gpu, tmp_path)
    setting.spy(monkeypatch)
    setting.seconds = {"tiles": 2.0, "expand": 2.0, winner: 1.0}
    prepared = setting.backend.prepare(setting.fmt, setting.parts, SHAPE, BF16)
    assert len(prepared) == 3
    setting.check(64, prepared)
    assert setting.ran == []
    setting.check(100, prepared)
    assert setting.ran[-1] == winner
    setting.check(120, prepared)
    assert setting.ran == [winner]
    assert gpu.launches == (["repack", "mma_sp"] * 2 if winner == "tiles" else ["expand"])
    setting.check(600, prepared)
    assert setting.ran == ["expand"]


@needs_compiler
def test_a_captured_graph_gets_the_way_that_needs_no_measurement(
    gpu: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = Setting(gpu, tmp_path)
    setting.spy(monkeypatch)
    setting.seconds = {"tiles": 1.0, "expand": 2.0}
    prepared = setting.backend.prepare(setting.fmt, setting.parts, SHAPE, BF16)
    setting.capturing = True
    setting.check(65, prepared)
    assert setting.ran == ["expand"]
    setting.capturing = False
    setting.check(65, prepared)
    setting.capturing = True
    setting.check(65, prepared)
    assert setting.ran == ["tiles"]


@needs_compiler
@pytest.mark.parametrize("winner", ["cusparselt", "cutlass", "dense"])
def test_plentiful_memory_holds_the_fastest_second_layout(
    gpu: EmulatedDevice, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, winner: str
) -> None:
    libraries = [FakeLibrary("cusparselt"), FakeLibrary("cutlass", 2)]
    setting = Setting(gpu, tmp_path, libraries=libraries, plentiful=True)
    setting.spy(monkeypatch)
    setting.seconds = dict.fromkeys(("dense", "cusparselt", "cutlass", "tiles", "expand"), 2.0)
    setting.seconds[winner] = 1.0
    prepared = setting.backend.prepare(setting.fmt, setting.parts, SHAPE, BF16)
    assert len(prepared) == (5 if winner == "cutlass" else 4)
    for tokens in (8, 65, 300, 1000):
        setting.check(tokens, prepared)
        assert (setting.ran[-1:] or ["tiles"]) == ["tiles" if tokens <= 64 else winner]
    searched = {library.name: library.searches for library in libraries}
    assert searched["cusparselt"] == (4 if winner == "cusparselt" else 3)
    setting.check(500, prepared)
    assert searched == {library.name: library.searches for library in libraries}
    if winner != "dense":
        used = next(library for library in libraries if library.name == winner)
        assert set(used.algorithms) == {7}


@needs_compiler
def test_a_second_layout_that_does_not_fit_is_not_asked(
    gpu: EmulatedDevice, tmp_path: Path
) -> None:
    class Refusing(FakeLibrary):
        def missing(self) -> str | None:
            return "not here"

    setting = Setting(gpu, tmp_path, libraries=[Refusing("cusparselt")], plentiful=True)
    monkey = setting.tuner
    monkey.timer = lambda call: 1.0
    prepared = setting.backend.prepare(setting.fmt, setting.parts, SHAPE, BF16)
    assert torch.equal(prepared[3], setting.weight.weight)


@needs_compiler
@pytest.mark.parametrize("values", ["int8:32", "fp8:32"])
def test_codes_are_served_too(gpu: EmulatedDevice, tmp_path: Path, values: str) -> None:
    setting = Setting(gpu, tmp_path)
    setting.tuner.timer = lambda call: 1.0
    fmt = make_format("nm", "2:4", values)
    drawn = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    weight = quantize(drawn, fmt.pattern.keep(drawn.abs(), "row"), fmt.values)
    prepared = setting.backend.prepare(fmt, fmt.pack("w", weight), SHAPE, BF16)
    x = torch.randn(70, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
    got = setting.backend.linear(x.reshape(2, 35, 64), prepared, fmt, SHAPE)
    assert got.shape == (2, 35, 32)
    want = x.double() @ weight.weight.double().t()
    torch.testing.assert_close(got.double().flatten(0, 1), want, rtol=2e-2, atol=2e-2)


def test_the_memory_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for word, plentiful in ((None, False), ("", False), ("scarce", False), ("plentiful", True)):
        if word is None:
            monkeypatch.delenv(semi_structured.MEMORY_VARIABLE, raising=False)
        else:
            monkeypatch.setenv(semi_structured.MEMORY_VARIABLE, word)
        assert plentiful_memory() is plentiful
    monkeypatch.setenv(semi_structured.MEMORY_VARIABLE, "plenty")
    with pytest.raises(UsageError, match="GBLM_GPU_MEMORY is 'plenty': use scarce or plentiful"):
        plentiful_memory()


def test_sizes_are_powers_of_two_up_to_a_limit() -> None:
    assert [measured_size(n) for n in (65, 128, 129, 8192, 100_000)] == [128, 128, 256, 8192, 8192]


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("_cslt_compress", ["input"]),
        (
            "_cslt_sparse_mm",
            ["compressed_A", "dense_B", "bias", "alpha", "out_dtype", "transpose_result", "alg_id"],
        ),
        (
            "_cslt_sparse_mm_search",
            ["compressed_A", "dense_B", "bias", "alpha", "out_dtype", "transpose_result"],
        ),
        ("_sparse_semi_structured_mm", ["mat1", "mat1_meta", "mat2"]),
    ],
)
def test_the_operators_of_this_pytorch_are_those_that_are_called(
    operator: str, arguments: list[str]
) -> None:
    schema = getattr(torch.ops.aten, operator).default._schema
    assert [one.name for one in schema.arguments][: len(arguments)] == arguments
    assert callable(getattr(torch, operator))


def test_the_classes_of_this_pytorch_have_the_constraints_that_are_read() -> None:
    assert [library.name for library in LIBRARIES] == ["cusparselt", "cutlass"]
    assert [library.num_tensors for library in LIBRARIES] == [1, 2]
    for library, rows, columns in ((CuSparseLt(), 16, 16), (Cutlass(), 32, 64)):
        for dtype in (BF16, torch.float16):
            limits = library.constraints(dtype)
            assert (limits.sparse_min_rows, limits.sparse_min_cols) == (rows, columns)
            assert limits.dense_min_rows == 8
        assert library.constraints(torch.float64) is None


def test_the_operators_give_a_row_per_token() -> None:
    x = torch.empty(16, 64, dtype=BF16, device="meta")
    one = torch.empty(32, 36, dtype=BF16, device="meta")
    assert CuSparseLt().product([one], x, 3).shape == (16, 32)
    values = torch.empty(32, 32, dtype=BF16, device="meta")
    meta = torch.empty(32, 4, dtype=torch.int16, device="meta")
    assert Cutlass().product([values, meta], x, 0).shape == (16, 32)


def test_libraries_say_why_they_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cutlass, "missing", lambda self: None)
    assert Cutlass().refuses((64, 128), BF16) is None
    assert Cutlass().refuses((40, 128), BF16) == "cutlass needs multiples of 32x64, not 40x128"
    assert Cutlass().refuses((64, 128), torch.float64) == "cutlass has no float64"
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert CuSparseLt().refuses((64, 64), BF16) == "this PyTorch has no cuSPARSELt"


def test_cutlass_layout_is_made_of_two_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = torch.sparse.SparseSemiStructuredTensorCUTLASS
    monkeypatch.setattr(kind, "_validate_device_dim_dtype_shape", lambda tensor: None)
    mask = torch.arange(128).remainder(4).lt(2).expand(64, 128)
    dense = torch.randn(64, 128).to(BF16) * mask
    values, meta = Cutlass().pack(dense)
    assert values.shape == (64, 64)
    assert torch.equal(values, dense[mask].reshape(64, 64))
    assert meta.numel() * meta.element_size() * 8 == 4 * 64 * 128 / 4


def test_the_answers_lie_in_gblms_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GBLM_CACHE", os.fspath(tmp_path))
    assert Answers().path == tmp_path / "autotune.json"
