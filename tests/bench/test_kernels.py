"""`gblm bench kernels`: its statistics on made-up numbers, the command end to end; no timings."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from alike import NEEDS_KERNELS
from conftest import Outcome

from gblm.bench import kernels as bench
from gblm.bench.devices import Device, block_timer
from gblm.bench.linears import Asked, Linear, num_copies, packed_linear, sparse_weight
from gblm.errors import MachineError, UsageError
from gblm.kernels import native
from gblm.record import Record

Run = Callable[..., Outcome]


def host(timer: Any = None, cold: int = 0) -> Device:
    return Device(torch.device("cpu"), ("cpu",), cold, timer, lambda _: lambda: 1.0)


def measured_with(reads: list[float], **more: Any) -> bench.Run:
    """A case of two linears with made-up seconds of calls, and the speeds of memory given."""
    times = {"torch_bf16": [4.0, 8.0, 2.0], "nm/2:4": [1.0, 1.0, 2.0]}
    linears = [
        Linear(name, "torch", size, (lambda x, name=name: name,))
        for name, size in (("torch_bf16", 64), ("nm/2:4", 36))
    ]
    taken = {name: iter(seconds) for name, seconds in times.items()}
    device = host(lambda calls: lambda: next(taken[calls[0]()]))
    settings = bench.Settings(((4, 8),), (1,), rounds=3, **more)
    run = bench.Run(device, settings, iter(reads).__next__)
    run.time(linears, bench.name_of((4, 8), 1), torch.empty(1, 8))
    return run


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else is on the machine."""
    monkeypatch.setattr(bench.noise, "measured", lambda: nullcontext({}))


@pytest.mark.usefixtures("quiet")
def test_rows_are_medians_of_rounds_and_shares_of_the_best_read() -> None:
    rows = measured_with([36e-9, 40e-9, 36e-9]).rows
    record = Record("kernels", {}, tuple(rows), "torch_bf16")
    load = bench.name_of((4, 8), 1)
    ratio = record.ratio("torch_bf16", load, "us", "nm/2:4")
    assert ratio is not None
    assert ratio.rounds == (4, 8, 1)
    assert record.value("nm/2:4", load, "us") == 1e6
    assert record.value("nm/2:4", load, "share_of_read_limit") == pytest.approx(36 / 40)


@pytest.mark.usefixtures("quiet")
def test_rounds_of_slow_memory_are_left_out_and_with_most_of_them_the_case() -> None:
    found = measured_with([20.0, 10.0, 20.0])
    (row,) = [row for row in found.rows if (row.side, row.metric) == ("torch_bf16", "us")]
    assert row.rounds == (4e6, 2e6)
    assert "4x8, 1 tokens: round 2 is left out: memory was read at 10.0 GB/s" in found.notes[0]
    lost = measured_with([20.0, 10.0, 10.0])
    assert lost.rows == []
    assert lost.reasons[0].startswith("4x8, 1 tokens: only 1 of 3 rounds were quiet; memory")
    kept = measured_with([20.0, 10.0, 10.0], allow_noise=True)
    assert len(kept.rows[-1].rounds) == 3
    assert len(kept.notes) == 2


def test_every_call_takes_the_next_copy_and_the_median_block_counts() -> None:
    seen: list[int] = []
    now = itertools.count()
    timed = block_timer(lambda: float(next(now)), [lambda i=i: seen.append(i) for i in range(3)])
    # Each copy once, then three calls to see how long one takes.
    assert seen == [0, 1, 2, 0, 1, 2]
    assert timed() == 1
    assert seen[6:] == [0, 1, 2]


def test_copies_fill_more_than_the_cache() -> None:
    assert num_copies(30, 100) == 4
    assert num_copies(300, 100) == 2
    assert num_copies(300, 0) == 1


@pytest.mark.parametrize("text", ["nm/2:4", "bitmask/0.5/int8", "dense/dense/int4:32"])
def test_a_drawn_weight_follows_its_format(text: str) -> None:
    fmt = Asked(text).settle(96)
    weight = sparse_weight(fmt, torch.randn(1100, 96))
    assert weight.mask.shape == (1100, 96)
    fmt.validate("w", fmt.pack("w", weight), (1100, 96))


@NEEDS_KERNELS
@pytest.mark.parametrize("text", ["nm/2:4", "bitmask/0.5/int8", "dense/dense/int4:32"])
def test_all_copies_give_the_same_product(text: str) -> None:
    linear = packed_linear(Asked(text), "cpu", torch.randn(32, 64), host(cold=20_000))
    assert len(linear.copies) * linear.size >= 20_000
    x = torch.randn(2, 64).bfloat16()
    assert len({call(x).float().sum().item() for call in linear.copies}) == 1


@pytest.mark.vllm
def test_vllm_baselines_are_linears() -> None:
    from gblm.bench.linears import vllm_bf16, vllm_operators, vllm_w8a8

    environment = dict(os.environ)

    operators = vllm_operators()
    assert dict(os.environ) == environment  # vLLM's import sets variables; children inherit none
    if operators is None:
        pytest.skip("no oneDNN linears of vLLM")
    weight, x = torch.randn(64, 128), torch.randn(3, 128).bfloat16()
    for make in (vllm_bf16, vllm_w8a8):
        linear = make(operators, weight, 0)
        got, want = linear.copies[0](x).float(), x.float() @ weight.t()
        assert (got - want).norm() < 0.02 * want.norm(), linear.name


@pytest.mark.slow
@NEEDS_KERNELS
def test_the_command_measures_a_tiny_shape(gblm: Run, tmp_path: Path) -> None:
    done = gblm(
        "bench", "kernels", "--shapes", "48x64", "--tokens", "1,2", "--rounds", 2, "--no-vllm",
        "--formats", "nm/2:4/int8,bitmask/0.5", "--formats", "bitmask/0.5",
        "--allow-noise", "--output", "out.json", "--json",
    )  # fmt: skip
    assert done.code == 0, done
    record = Record.read(tmp_path / "out.json")
    assert json.loads(done.out) == record.as_json()
    assert record.command.startswith("gblm bench kernels --shapes 48x64")
    timed = [row for row in record.rows if row.metric == "us" and row.load == "48x64, 2 tokens"]
    names = ["torch_bf16", "dense/dense/int8", "nm/2:4/int8", "dense/dense", "bitmask/0.5"]
    assert [row.side for row in timed] == names
    assert all(len(row.rounds) == 2 and row.value for row in timed)
    assert record.sides["nm/2:4/int8"] == {
        "backend": "cpu", "spec": "nm/2:4/int8:64", "control": "dense/dense/int8",
    }  # fmt: skip
    assert record.provenance["instruction_set"] == native.instruction_set()
    assert record.provenance["machine"]["cpu"]


@NEEDS_KERNELS
def test_the_table_names_every_linear(gblm: Run) -> None:
    done = gblm("bench", "kernels", "--shapes", "16x32", "--tokens", 1, "--rounds", 1, "--no-vllm",
                "--formats", "nm/2:4", "--allow-noise")  # fmt: skip
    assert done.code == 0, done
    assert "16x32, 1 tokens" in done.out
    assert all(name in done.out for name in ("torch_bf16", "dense/dense", "share_of_read_limit"))
    assert "instruction set " in done.out


@NEEDS_KERNELS
@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--formats", "2:4"], 2, "format '2:4' is unknown: give FORMAT/PATTERN"),
        (["--formats", "foo/2:4"], 2, "this version reads nm, bitmask, dense"),
        (["--formats", "nm/2:4/int8:128", "--shapes", "64x96"], 2, "groups of 128"),
        (["--shapes", "0x64"], 2, "both positive, or llama-7b"),
        (["--shapes", "900000x900000"], 3, "GB are free"),
        (["--tokens", "0"], 2, "'0' is not a positive whole number"),
        (["--threads", "4096"], 2, "this process may use"),
        (["--backend", "gpu"], 2, "choose from cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_sentence(gblm: Run, words: list[str], code: int, sentence: str) -> None:
    done = gblm("bench", "kernels", *words)
    assert done.code == code, done
    assert sentence in done.err, done
    assert "Traceback" not in done.err


def test_without_kernels_there_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "refusal", lambda: "not built")
    with pytest.raises(MachineError, match="no CPU kernels to measure: not built"):
        bench.bench_kernels(bench.Settings(shapes=((16, 32),), tokens=(1,)))


def test_named_sets_are_shapes() -> None:
    assert bench.parse_shapes(["4096x4096", "llama-7b"]) == bench.SHAPE_SETS["llama-7b"]
    with pytest.raises(UsageError):
        bench.parse_shapes(["-1x5"])
