"""`gblm bench kernels`: its statistics on made-up numbers, the command end to end; no timings."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome

from gblm.bench import kernels as bench
from gblm.bench.linears import Asked, Linear, num_copies, packed_linear, sparse_weight
from gblm.bench.paired import percentile, share_of_limit, speedup
from gblm.bench.rounds import add_shares, summarise
from gblm.errors import MachineError, UsageError
from gblm.kernels import native

Run = Callable[..., Outcome]
needs_kernels = pytest.mark.skipif(native.refusal() is not None, reason="no CPU kernels")
TIMES = {
    "torch_bf16": [[4.0, 4.0, 400.0], [8.0, 8.0, 8.0], [2.0, 2.0, 2.0]],
    "dense/dense": [[2.0, 2.0, 2.0], [8.0, 8.0, 8.0], [1.0, 1.0, 1.0]],
    "nm/2:4": [[1.0, 1.0, 90.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]],
}


def test_ratios_are_of_medians_within_a_round_then_of_rounds() -> None:
    assert speedup(TIMES, "nm/2:4", "torch_bf16") == {"median": 4, "min": 2, "max": 8}


def test_percentile_counts_all_rounds() -> None:
    assert percentile(TIMES["torch_bf16"], 0.05) == 2
    assert percentile(TIMES["torch_bf16"], 1.0) == 400


def test_share_of_limit_has_its_spread() -> None:
    assert share_of_limit([1.0, 2.0, 4.0], 8, 16) == {"median": 0.25, "min": 0.125, "max": 0.5}


def made_up() -> list[Linear]:
    return [
        Linear("torch_bf16", "torch", "", 64, []),
        Linear("dense/dense", "cpu", "dense/dense", 64, [], control="dense/dense"),
        Linear("nm/2:4", "cpu", "nm/2:4", 36, [], control="dense/dense"),
    ]


def test_rows_compare_with_baselines_and_the_dense_control() -> None:
    rows = summarise(made_up(), TIMES, (4, 8), tokens=1)
    assert [set(row["speedup"]) for row in rows] == [set(), {"torch_bf16"}, {"torch_bf16", "dense"}]
    assert rows[2]["speedup"]["dense"] == {"median": 2, "min": 1, "max": 8}
    assert rows[2]["bits_per_weight"] == 9
    assert (rows[2]["us"], rows[2]["calls"]) == (1e6, 9)


def test_the_read_limit_is_the_fastest_round_of_all_cases() -> None:
    rows = summarise(made_up(), TIMES, (4, 8), tokens=1)
    cases = [{"read_limit_gb_s": {"max": top}, "rows": rows} for top in (20.0, 40.0)]
    assert add_shares(cases) == 40
    assert rows[2]["share_of_read_limit"]["median"] == pytest.approx(36 / 40e9)


def test_every_call_takes_the_next_copy() -> None:
    seen: list[int] = []
    copies = [lambda x, i=i: seen.append(i) or x for i in range(3)]
    linear = Linear("a", "torch", "", 1, copies)
    ticks = iter(range(100))
    assert linear.time(torch.zeros(1), 4, lambda: float(next(ticks))) == [1, 1, 1, 1]
    linear.time(torch.zeros(1), 1, lambda: 0.0)
    assert seen == [0, 1, 2, 0, 1]


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


@needs_kernels
@pytest.mark.parametrize("text", ["nm/2:4", "bitmask/0.5/int8", "dense/dense/int4:32"])
def test_all_copies_give_the_same_product(text: str) -> None:
    linear = packed_linear(Asked(text), "cpu", torch.randn(32, 64), 20_000, lambda: 0.0)
    assert len(linear.copies) * linear.size >= 20_000
    x = torch.randn(2, 64).bfloat16()
    assert len({call(x).float().sum().item() for call in linear.copies}) == 1


@pytest.mark.vllm
def test_vllm_baselines_are_linears() -> None:
    from gblm.bench.vllm_linears import vllm_linears, vllm_operators

    environment = dict(os.environ)

    operators = vllm_operators()
    assert dict(os.environ) == environment  # vLLM's import sets variables; children inherit none
    if operators is None:
        pytest.skip("no oneDNN linears of vLLM")
    weight, x = torch.randn(64, 128), torch.randn(3, 128).bfloat16()
    for linear in vllm_linears(operators, weight, 0):
        got, want = linear.copies[0](x).float(), x.float() @ weight.t()
        assert (got - want).norm() < 0.02 * want.norm(), linear.name


@needs_kernels
def test_the_command_measures_a_tiny_shape(gblm: Run, tmp_path: Path) -> None:
    done = gblm(
        "bench", "kernels", "--shapes", "48x64", "--tokens", "1,2", "--rounds", 2, "--no-vllm",
        "--formats", "nm/2:4/int8,bitmask/0.5", "--formats", "bitmask/0.5",
        "--output", "out.json", "--json",
    )  # fmt: skip
    assert done.code == 0, done
    record = json.loads(done.out)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written.pop("command").startswith("gblm bench kernels --shapes 48x64")
    assert record == written
    assert [case["tokens"] for case in record["cases"]] == [1, 2]
    rows = {row["linear"]: row for row in record["cases"][0]["rows"]}
    assert list(rows) == [
        "torch_bf16", "dense/dense/int8", "nm/2:4/int8", "dense/dense", "bitmask/0.5",
    ]  # fmt: skip
    assert rows["nm/2:4/int8"]["spec"] == "nm/2:4/int8:64"
    assert set(rows["nm/2:4/int8"]["speedup"]) == {"torch_bf16", "dense"}
    assert all(len(row["us_rounds"]) == 2 and row["us"] > 0 for row in rows.values())
    assert record["kernels"]["threads"] == 1
    assert record["kernels"]["instruction_set"] == native.instruction_set()
    assert record["provenance"]["machine"]["cpu"]
    assert {row["linear"] for row in record["prepare"]} == set(rows) - {"torch_bf16"}
    assert set(record["overhead_us"]) == {"torch_bf16", "dense/dense", "dense/dense/int8"}


@needs_kernels
def test_the_table_names_every_linear(gblm: Run) -> None:
    done = gblm("bench", "kernels", "--shapes", "16x32", "--tokens", 1, "--rounds", 1, "--no-vllm",
                "--formats", "nm/2:4", "--isa", "portable")  # fmt: skip
    assert done.code == 0, done
    assert "16x32, tokens: 1" in done.out
    assert "x dense control" in done.out
    assert "portable" in done.out


@needs_kernels
@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["--formats", "2:4"], 2, "format '2:4' is unknown: give FORMAT/PATTERN"),
        (["--formats", "foo/2:4"], 2, "this version reads nm, bitmask, dense"),
        (["--formats", "nm/9:4"], 2, "N:M needs 0 < N < M"),
        (["--formats", "nm/2:4/int9"], 2, "values 'int9' are unknown"),
        (["--formats", "nm/2:4/int8:128", "--shapes", "64x96"], 2, "groups of 128"),
        (["--formats", "nm/4:16", "--shapes", "64x8"], 2, "groups of 16"),
        (["--shapes", "0x64"], 2, "both positive, or llama-7b"),
        (["--shapes", "64"], 2, "both positive, or llama-7b"),
        (["--shapes", "900000x900000"], 3, "GB are free"),
        (["--tokens", "0"], 2, "'0' is not a positive number"),
        (["--tokens", ","], 2, "a word is empty"),
        (["--threads", "4096"], 2, "this process may use"),
        (["--backends", "gpu"], 2, "choose from cpu"),
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


@needs_kernels
def test_a_missing_instruction_set_is_a_fact_of_the_machine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = bench.Settings(((16, 32),), (1,), ("nm/2:4",), isa="neon", vllm=False, cold=0)
    with pytest.raises(MachineError, match="'neon' is not available"):
        bench.bench_kernels(settings)


def test_named_sets_are_shapes() -> None:
    assert bench.parse_shapes(["4096x4096", "llama-7b"]) == bench.SHAPE_SETS["llama-7b"]
    with pytest.raises(UsageError):
        bench.parse_shapes(["-1x5"])


def test_a_record_becomes_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, gblm: Run
) -> None:
    import kernel_tables

    monkeypatch.setattr(kernel_tables, "RESULTS", tmp_path)
    assert kernel_tables.kernels() == "Nothing has been recorded yet."
    rows = summarise(made_up(), TIMES, (4, 8), tokens=1)
    cases = [{"shape": [4, 8], "tokens": 1, "read_limit_gb_s": {"max": 1.0}, "rows": rows}]
    run = {
        "read_limit_gb_s": add_shares(cases), "cases": cases, "settings": {"rounds": 3},
        "prepare": [{"shape": [4, 8], "gb_s_per_core": 1.25}],
        "overhead_us": {"torch_bf16": {"median": 1.5}},
        "kernels": {
            "threads": 1, "instruction_set": "avx2", "clock": "wall time", "cpu_model": "model 1",
            "compiler": "g++", "cold_bytes": 1 << 27, "last_level_cache": 1 << 25,
            "load_average_before": 0.0, "load_average_after": 0.0,
        },
    }  # fmt: skip
    provenance = {"machine": {"cpu": "CPU", "cores": 2}, "python": "3", "packages": {"torch": "2"},
                  "commit": "0" * 40}  # fmt: skip
    record = {"provenance": provenance, "runs": [run]}
    (tmp_path / "kernels-cpu.json").write_text(json.dumps(record))
    text = kernel_tables.kernels()
    assert "| `nm/2:4` | 9.00 | 1000000 |" in text
    assert "4.00 (2.00–8.00) | 2.00 (1.00–8.00) |" in text
