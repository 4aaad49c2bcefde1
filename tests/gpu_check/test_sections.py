"""Each section of the GPU check on this CPU: its Python, its rows, what it skips and notices."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_emulated import missing
from gpu_place import CpuPlace, FakeLibrary, emulated_backends
from torch import Tensor

from gblm.formats import Format, Shape
from gblm.gpu_check import sanitizer
from gblm.gpu_check.bandwidth import measure_limits, read_limit
from gblm.gpu_check.correctness import Cases, check_products, error_of
from gblm.gpu_check.decode import Decoder, ModelShape, measure_decoding
from gblm.gpu_check.library import LibraryBackend
from gblm.gpu_check.pruning import LayerShape, measure_pruning
from gblm.gpu_check.section import Section
from gblm.gpu_check.times import measure_times
from gblm.kernels import BACKENDS
from gblm.kernels.reference import Reference
from gblm.weights import SparseWeight

BF16 = torch.bfloat16
SMALL = Cases(
    specs=("nm/2:4", "nm/2:4/int8:32", "bitmask/0.5"),
    shapes=((40, 96),),
    dtypes=(BF16,),
    tokens=(1, 70),
    in_graphs=(70,),
)


class Broken(Reference):
    """Leaves the last row of outputs as the memory was, or all of them off by one."""

    def __init__(self, how: str) -> None:
        self.how = how

    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        right = super().linear(x, prepared, fmt, shape)
        if self.how == "raises":
            raise ValueError("no such kernel\nsecond line")
        if self.how == "off":
            return right + 1
        out = torch.empty_like(right)
        out[..., :-1] = right[..., :-1]
        return out


def section(seconds: float = 600.0) -> Section:
    ticks = iter(range(10**6))
    return Section("test", seconds, lambda: float(next(ticks)) / 1000)


def place(**backends: Any) -> CpuPlace:
    return CpuPlace(backends or {"reference": Reference()})


@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_products_of_every_backend_on_the_emulated_gpu(tmp_path: Path) -> None:
    own, here = section(), CpuPlace(emulated_backends(tmp_path))
    check_products(here, own, SMALL)
    assert own.failed == own.skipped == []
    found = {(row["backend"], row["spec"]) for row in own.rows}
    assert found == {
        *((name, spec) for name in here.backends for spec in SMALL.specs
          if name == "delta" or spec != "bitmask/0.5"),
        ("cublas bf16", "nm/2:4"),
    }  # fmt: skip
    for row in own.rows:
        assert row["error"] < 1e-3, row
        assert row["replays"] is True
        assert row["cases"] == 2


def test_fp8_is_compared_and_timed() -> None:
    own, spec = section(), "nm/2:4/fp8:32"
    check_products(place(), own, Cases((spec,), ((40, 96),), (BF16, torch.float16), (1, 70), (70,)))
    assert [(row["spec"], row["error"] < 1e-3) for row in own.rows] == [(spec, True)] * 2
    measure_times(place(), own, 1e9, {"tiny": (32, 64)}, (1,), (spec,))
    assert own.failed == own.skipped == []
    assert own.rows[-1]["bytes"] == 32 * (32 + 8 + 4)


@pytest.mark.parametrize(("how", "least"), [("off", 0.1), ("poisoned", 1e29)])
def test_a_wrong_product_is_seen(how: str, least: float) -> None:
    own = section()
    check_products(place(broken=Broken(how)), own, SMALL)
    errors = [row["error"] for row in own.rows if row["backend"] == "broken"]
    assert len(errors) == 3
    assert min(errors) > least
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_raises_is_noted_and_the_rest_goes_on() -> None:
    own = section()
    check_products(place(broken=Broken("raises"), reference=Reference()), own, SMALL)
    assert len(own.failed) == 3
    assert own.failed[0].endswith("ValueError: no such kernel")
    assert {row["backend"] for row in own.rows} == {"reference", "cublas bf16"}


def test_a_broken_device_ends_a_section_soon() -> None:
    own = section()
    for number in range(40):
        own.attempt(str(number), lambda: [][0])
    assert len(own.failed) == 25
    assert own.skipped[0] == "25: too much has failed before"


def test_each_library_is_compared_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeLibrary("cutlass")
    own, here = section(), CpuPlace({"cutlass": LibraryBackend(fake)})
    cases = Cases(("nm/2:4", "nm/2:4/int8:32", "bitmask/0.5"), ((48, 96),), (BF16,), (1, 9), (9,))
    check_products(here, own, cases)
    assert [(row["backend"], row["spec"]) for row in own.rows] == [
        ("cutlass", "nm/2:4"), ("cublas bf16", "nm/2:4"),
    ]  # fmt: skip
    assert own.rows[0]["error"] < 1e-3
    assert fake.searches == 2
    assert fake.algorithms == [7] * 4


def test_a_section_without_time_says_what_it_skipped() -> None:
    own = section(0.0)
    check_products(place(), own, SMALL)
    assert own.rows == own.failed == []
    assert own.skipped[0] == "nm/2:4 40x96 bfloat16: no time left"


def test_too_little_memory_is_no_failure() -> None:
    own = section()

    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert own.attempt("a weight", work) is None
    assert own.skipped == ["a weight: too little memory"]
    assert own.failed == []


def test_rounding_the_product_once_is_no_error() -> None:
    weight = SparseWeight.from_zeros(torch.randn(8, 64))
    x = torch.randn(3, 64).to(BF16)
    exact = x.double() @ weight.weight.double().t()
    assert error_of(exact.to(BF16), x, weight) == 0
    assert error_of((1.01 * exact).to(BF16), x, weight) > 5e-3


def test_limits_of_the_device() -> None:
    own = section()
    measure_limits(place(), own, size=1 << 12, side=16)
    assert [row["what"] for row in own.rows] == ["read", "copy", "bf16"]
    limit = read_limit(own)
    assert limit == 1e9 * max(row["per_second"] for row in own.rows[:2])
    assert read_limit(section()) is None


def test_times_have_a_baseline_and_a_share_of_the_limit() -> None:
    own = section()
    here = place(reference=Reference(), dense=BACKENDS["dense"])
    measure_times(here, own, 1e9, {"tiny": (32, 64)}, (1, 16), ("nm/2:4", "nm/2:4/int8:32"))
    assert own.failed == own.skipped == []
    contenders = [(row["contender"], row["spec"]) for row in own.rows[::2]]
    assert contenders == [
        ("cublas bf16", ""), ("cublas fp8", ""),
        *((name, spec) for spec in ("nm/2:4", "nm/2:4/int8:32") for name in here.backends),
    ]  # fmt: skip
    for row in own.rows:
        base = next(r for r in own.rows if r["tokens"] == row["tokens"])
        assert row["x_cublas"] == base["us"] / row["us"]
        assert row["share_of_read"] == pytest.approx(row["bytes"] / row["us"] / 1e3)
    assert own.rows[0]["bytes"] == 2 * 32 * 64
    assert own.rows[4]["bytes"] == 32 * 64 + 32 * 64 // 8


def test_times_without_a_limit_have_no_share() -> None:
    own = section()
    measure_times(place(), own, None, {"tiny": (32, 64)}, (1,), ())
    assert [row["share_of_read"] for row in own.rows] == [None, None]


def test_pruning_speed_is_that_of_the_products_own_code() -> None:
    own = section()
    measure_pruning(
        place(), own, LayerShape(32, 64, 16), ("wanda", "gblm", "sparsegpt"), ("2:4", "0.5")
    )
    assert own.failed == own.skipped == []
    assert [row.get("statistic") for row in own.rows[:2]] == ["act_norm", "hessian"]
    pruned = [(row["method"], row["pattern"]) for row in own.rows[2:]]
    assert pruned == [(m, p) for m in ("wanda", "gblm", "sparsegpt") for p in ("2:4", "0.5")]
    assert all(row["layers_per_minute"] == 60 / row["seconds"] for row in own.rows[2:])


TINY = ModelShape(layers=2, hidden=64, inner=96, heads=4, vocabulary=50, context=6)


def test_the_decode_loop_takes_the_first_backend_and_compares_with_dense() -> None:
    own = section()
    here = place(reference=Reference(), dense=BACKENDS["dense"])
    measure_decoding(here, own, TINY, (1, 3), ("nm/2:4", "nm/2:4/int8:32"))
    assert own.failed == own.skipped == []
    assert [(r["contender"], r["spec"], r["batch"]) for r in own.rows] == [
        ("cublas bf16", "", 1), ("cublas bf16", "", 3),
        *(("reference", spec, n) for spec in ("nm/2:4", "nm/2:4/int8:32") for n in (1, 3)),
    ]  # fmt: skip
    assert own.rows[2]["x_dense"] == (
        own.rows[2]["tokens_per_second"] / own.rows[0]["tokens_per_second"]
    )


def test_the_decoder_is_a_transformer() -> None:
    here, seen = place(), []

    def linear(rows: int) -> Any:
        def call(x: Tensor) -> Tensor:
            seen.append((tuple(x.shape), rows))
            return x.new_zeros(len(x), rows)

        return call

    layer = [linear(rows) for rows, _ in TINY.linears]
    decoder = Decoder(here, TINY, 3, [layer, layer])
    tokens = decoder.step()
    assert tokens.shape == (3,)
    assert tokens.dtype == torch.int64
    # With linears that give zero, the head sees the embedding.
    hidden = torch.nn.functional.rms_norm(decoder._embedded, (64,))
    assert torch.equal(tokens, (hidden @ decoder._head.t()).argmax(dim=-1))
    assert seen == 2 * [((3, 64), 192), ((3, 64), 64), ((3, 64), 192), ((3, 96), 64)]
    assert all(not keys[:, :, -1].any() for keys, _ in decoder._caches)


def fake_sanitizer(folder: Path, body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = folder / sanitizer.PROGRAM
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_the_sanitizers_verdict_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_sanitizer(
        tmp_path,
        'test "$PYTORCH_NO_CUDA_MEMORY_CACHING" = 1 || exit 3\n'
        'echo "========= ERROR SUMMARY: 2 errors"\n'
        'case "$2" in memcheck) exit 0;; racecheck) exit 86;; *) echo lost >&2; exit 1;; esac',
        monkeypatch,
    )
    own = Section("sanitizer", 60.0, lambda: 0.0)
    sanitizer.run_sanitizer(own)
    assert [(row["tool"], row["clean"], row["summary"]) for row in own.rows] == [
        ("memcheck", True, "ERROR SUMMARY: 2 errors"),
        ("racecheck", False, "ERROR SUMMARY: 2 errors"),
    ]
    assert own.failed == ["synccheck: MachineError: ended with code 1: lost"]


def test_a_sanitizer_that_hangs_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sanitizer(tmp_path, "exec sleep 60", monkeypatch)
    own = Section("sanitizer", 0.1, lambda: 0.0)
    sanitizer.run_sanitizer(own, ("memcheck",))
    assert own.skipped == ["memcheck: did not end in time"]


def test_without_a_sanitizer_the_section_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    own = section()
    sanitizer.run_sanitizer(own)
    assert own.skipped == [
        "all tools: compute-sanitizer was not found; it comes with the CUDA toolkit"
    ]


@pytest.mark.parametrize(("backend", "code"), [(Reference(), 0), (Broken("off"), 1)])
def test_the_sanitizers_cases_run(
    backend: Reference, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    small = Cases(specs=("nm/2:4",), shapes=((40, 96),), dtypes=(BF16,), tokens=(1,), in_graphs=())
    monkeypatch.setattr(sanitizer, "SMALL", small)
    assert sanitizer.small_cases(CpuPlace({"one": backend})) == code
    assert ("'error'" in capsys.readouterr().err) == bool(code)
    assert sanitizer.small_cases(CpuPlace({})) == 0
