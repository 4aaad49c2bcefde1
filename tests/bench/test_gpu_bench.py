"""`gblm bench kernels --device cuda` without a device: an emulated GPU by the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click.testing
import pytest
import torch
from conftest import Outcome
from gpu_emulated import emulated_backends, missing
from torch import Tensor

from gblm.bench import kernels as bench
from gblm.bench.devices import Device
from gblm.bench.kernels import Settings, measure
from gblm.bench.linears import DENSE, TWO_FOUR
from gblm.cli import cli
from gblm.errors import UsageError
from gblm.kernels import BACKENDS
from gblm.record import Record

SETTINGS = Settings(shapes=((32, 64),), tokens=(1, 70), device="cuda", rounds=3, allow_noise=True,
                    formats=("nm/2:4", "nm/2:4/int4:32", "bitmask/0.5"))  # fmt: skip


def host_timer(calls: Sequence[Callable[[], object]]) -> Callable[[], float]:
    def timed() -> float:
        began = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - began) / len(calls)

    timed()
    return timed


@pytest.fixture(autouse=True)
def dense_two_four(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's 2:4 weights need a device."""
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone())


def host(*usual: str) -> Device:
    return Device(torch.device("cpu"), usual, 0, host_timer,
                  lambda size: lambda: 20.0, {"capability": "9.0"})  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(missing() is not None, reason=str(missing()))
def test_every_side_on_the_emulated_gpu_has_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, backend in emulated_backends().items():
        monkeypatch.setitem(BACKENDS, name, backend)
    record = measure(host("mma_sp", "delta"), SETTINGS)
    assert record.verdict.reasons == ()
    packed = {"nm/2:4 on mma_sp", "nm/2:4/int4:32 on mma_sp", "nm/2:4 on delta",
              "nm/2:4/int4:32 on delta", "bitmask/0.5 on delta"}  # fmt: skip
    assert set(record.sides) == {"memory", DENSE, TWO_FOUR, *packed}
    for tokens in (1, 70):
        load = f"32x64, {tokens} tokens"
        for side in (DENSE, TWO_FOUR, *packed):
            row = record.row(side, load, "us")
            assert row is not None
            assert len(row.rounds) == 3
            assert record.ratio(side, load, "us") is not None
    assert record.value("memory", "32x64, 1 tokens", "read_limit_gb_s") == 20
    # Tiles hold 9 of 16 bits, beside one scale that is not used.
    assert record.value("nm/2:4 on mma_sp", "32x64", "bytes") == 32 * 64 * 9 / 8 + 2
    record.write(tmp_path / "gpu.json")
    assert Record.read(tmp_path / "gpu.json").rows == record.rows


def test_what_raises_costs_its_own_figures_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(type(BACKENDS["reference"])):  # type: ignore[misc]
        name = "broken"

        def linear(self, *arguments: Any, **named: Any) -> Tensor:
            raise ValueError("no such kernel\nsecond line")

    monkeypatch.setitem(BACKENDS, "broken", Broken())
    record = measure(host("broken", "dense"), SETTINGS)
    assert not record.verdict.valid
    assert "nm/2:4 on broken, 32x64, 1 tokens: ValueError: no such kernel" in record.verdict.reasons
    timed = {row.side for row in record.rows if row.load == "32x64, 70 tokens"}
    assert timed == {"memory", DENSE, TWO_FOUR, "nm/2:4 on dense", "nm/2:4/int4:32 on dense",
                     "bitmask/0.5 on dense"}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"backends": ("gpu",)}, "backend 'gpu' is unknown"),
        ({"backends": ("mma_sp",)}, "no backend can serve nm/2:4"),
        ({"formats": ("nm/2:4/int8:96",)}, "64 columns"),
        ({"formats": ("nm/2",)}, "nm/2"),
    ],
)
def test_what_cannot_be_measured_is_refused_before(changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        measure(host("dense"), replace(SETTINGS, **changed))


def test_sides_take_turns_in_alternating_order() -> None:
    seen: list[str] = []
    run = bench.Run(host(), SETTINGS, lambda: 1.0)
    timed = {name: lambda name=name: seen.append(name) or 1.0 for name in "ab"}
    run.rounds(timed, "load")
    assert "".join(seen) == "abbaab"


@pytest.mark.slow
@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="a CUDA device: runs where there is none",
)
def test_without_a_device_the_command_refuses_in_one_sentence(
    gblm: Callable[..., Outcome],
) -> None:
    done = gblm("bench", "kernels", "--device", "cuda")
    assert done.code == 3
    assert "--device cuda needs a CUDA device; PyTorch sees none." in done.err


def test_options_that_say_nothing_are_refused(gblm: Callable[..., Outcome]) -> None:
    done = gblm("bench", "kernels", "--device", "cuda", "--threads", "2")
    assert done.code == 2
    assert "does not go with --device" in done.err


def test_the_command_writes_the_record_and_prints_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = measure(host("dense"), SETTINGS)
    monkeypatch.setattr(bench, "bench_kernels", lambda settings, progress: record)
    path = tmp_path / "r.json"
    words = ["bench", "kernels", "--device", "cuda", "--output", str(path)]
    done = click.testing.CliRunner().invoke(cli, words, obj={})
    assert done.exit_code == 0, done.output
    assert "bitmask/0.5 on dense" in done.output
    assert Record.read(path).rows == record.rows
