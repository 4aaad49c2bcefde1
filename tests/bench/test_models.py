"""`gblm bench models`: order, statistics and verdicts on synthetic runs; two real ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import click
import numpy as np
import pytest
from conftest import Outcome, save_tiny_model
from vllm_server import OPTIONS

from gblm.bench.loop import one_request, prompts
from gblm.bench.models import Plan, bench_models, caveats, order, record_of, round_runs, unchecked
from gblm.bench.paired import bootstrap_median
from gblm.bench.requests import Request, Slo
from gblm.bench.sides import Side, parse_sides
from gblm.bench.tools import seen_of
from gblm.bench.validity import Asked, Limits, Seen
from gblm.commands.bench_models import command, widths
from gblm.errors import InputError, UsageError

ASKED = Asked(num_prompts=4, input_len=10, output_len=5)


def side(name: str, engine: str = "vllm") -> Side:
    return Side(name, engine, Path(__file__))


def seen(tpot: float, **changed: object) -> Seen:
    """Four requests one after the other, each token taking so many seconds."""
    latency = 0.1 + 4 * tpot
    requests = [Request(i * latency, latency, 10, 5, 0.1, (tpot,) * 4) for i in range(4)]
    fields: dict[str, object] = {"prompts": "vllm:a", "noise": {"joules": 8.0}} | changed
    return Seen(requests, 4 * latency, **fields)  # type: ignore[arg-type]


def record(*rounds: dict[str, Seen], slo: Slo | None = None) -> dict:
    plan = Plan((ASKED,), len(rounds), slo=slo)
    runs = [run for number, found in enumerate(rounds)
            for run in round_runs(number, {k: [v] for k, v in found.items()}, plan)]  # fmt: skip
    return record_of([side(name) for name in rounds[0]], plan, runs)


def test_ratios_are_paired_by_round() -> None:
    found = record(
        {"a": seen(0.010), "b": seen(0.020)},
        {"b": seen(0.090), "a": seen(0.030)},
        {"a": seen(0.020), "b": seen(0.080)},
    )
    assert found["valid"] is True
    base, row = found["rows"]
    assert "ratio" not in base
    assert row["metrics"]["tpot_ms_p50"] == pytest.approx({"median": 80, "min": 20, "max": 90})
    assert row["ratio"]["tpot_ms_p50"] == pytest.approx({"median": 3, "low": 2, "high": 4})
    assert row["metrics"]["joules_per_token"]["median"] == pytest.approx(8 / 20)


def test_an_invalid_run_takes_the_ratio_and_the_verdict_with_it() -> None:
    found = record(
        {"a": seen(0.01), "b": seen(0.02), "c": seen(0.03)},
        {"a": seen(0.01), "b": seen(0.02, preemptions=2.0), "c": seen(0.03)},
    )
    assert found["valid"] is False
    assert found["reasons"] == [
        "b, concurrency 1, round 2: 2 preemptions: the key-value cache is too small for this load"
    ]
    assert [row["valid"] for row in found["rows"]] == [True, False, True]
    assert "ratio" not in found["rows"][1]
    assert found["rows"][2]["ratio"]["tpot_ms_p50"]["median"] == pytest.approx(3)


def test_an_invalid_baseline_leaves_no_ratio_at_all() -> None:
    found = record({"a": seen(0.01, failed=1), "b": seen(0.02)})
    assert not any("ratio" in row for row in found["rows"])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("1.5", "1.5 is not a whole number"), ("0", "'0' is not a positive number"),
     ("1,x", "'x' is not a positive number"), ("nan", "'nan' is not a positive number")],
)  # fmt: skip
def test_concurrency_is_a_whole_number_or_has_no_limit(text: str, sentence: str) -> None:
    context, option = click.Context(command), click.Option(["--concurrency"])
    assert widths(context, option, "4,1,inf,4") == (4, 1, float("inf"))
    with pytest.raises(click.BadParameter, match=sentence):
        widths(context, option, text)


def test_what_could_not_be_checked_is_said() -> None:
    assert any("thermal throttling was not checked" in words for words in
               record({"a": seen(0.01), "b": seen(0.02)})["caveats"])  # fmt: skip
    cool = {"a": seen(0.01, noise={"cpu_throttles": 0}), "b": seen(0.02)}
    assert not any("not checked" in words for words in record(cool)["caveats"])
    raised = caveats([side("a")], Plan((ASKED,), 6, limits=Limits(0.02, 1.0)))
    assert "limits of noise were raised: steal up to 2%, other load up to 100%" in raised[-1]
    assert not any("raised" in words for words in caveats([side("a")], Plan((ASKED,), 6)))
    without_server = unchecked([side("a")], Plan((ASKED,), tool="latency"), [])
    assert "no server that counts preemptions" in without_server[0]


def test_other_prompts_condemn_every_side_of_the_round() -> None:
    found = record({"a": seen(0.01), "b": seen(0.02, prompts="vllm:b")})
    assert [row["valid"] for row in found["rows"]] == [False, False]


def test_a_side_without_successful_requests_is_recorded_not_a_crash() -> None:
    found = record({"a": seen(0.01), "b": Seen((), 1.0, failed=4)})
    assert found["valid"] is False
    assert "0 of 4 requests succeeded" in found["reasons"][0]


def test_goodput_stands_beside_the_rest() -> None:
    found = record({"a": seen(0.01), "b": seen(0.05)}, slo=Slo(tpot=30))
    shares = [row["metrics"]["slo_share"]["median"] for row in found["rows"]]
    assert shares == [1.0, 0.0]
    assert found["rows"][1]["ratio"]["goodput_requests_per_s"]["median"] == 0


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_side_always_stands_before_another(count: int) -> None:
    sides = [side(str(n)) for n in range(count)]
    orders = [[s.name for s in order(sides, number)] for number in range(2 * count)]
    for a, b in permutations([s.name for s in sides], 2):
        before = sum(o.index(a) < o.index(b) for o in orders)
        assert before == count
    assert len({o[0] for o in orders}) == count


def test_the_interval_is_that_of_the_resampled_medians() -> None:
    values = [0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.3]
    found = bootstrap_median(values)
    draws = np.random.default_rng(7).choice(values, (20_000, 7))
    low, high = np.quantile(np.median(draws, axis=1), [0.025, 0.975])
    assert found["median"] == 1.0
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.06)
    assert bootstrap_median([2.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert bootstrap_median(values) == found


def test_sides_are_named_and_their_engine_is_guessed(tiny: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    found = parse_sides([str(tiny), f"loop=hf:{tiny}", str(gguf), f"q8=llama.cpp:{gguf}"])
    assert [(s.name, s.engine) for s in found] == [
        ("tiny", "vllm"), ("loop", "hf"), ("x.gguf", "llama.cpp"), ("q8", "llama.cpp"),
    ]  # fmt: skip


def test_sides_that_are_none_are_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match="two models or more"):
        parse_sides([str(tiny)])
    with pytest.raises(UsageError, match="two sides are called 'tiny'"):
        parse_sides([str(tiny), f"hf:{tiny}"])
    with pytest.raises(InputError, match="no such file"):
        parse_sides([str(tiny), "llama.cpp:./nothing.gguf"])
    with pytest.raises(UsageError, match="NAME="):
        parse_sides([str(tiny), "x=hf:"])


def test_what_cannot_be_measured_is_refused_before_anything_starts() -> None:
    sides = [side("a"), side("b", "hf")]
    with pytest.raises(UsageError, match="hf runs one request at a time"):
        bench_models(sides, Plan((Asked(4, 10, 5, concurrency=2),)))
    with pytest.raises(UsageError, match="latency has no --request-rate"):
        bench_models([side("a")], Plan((Asked(4, 10, 5, 1, 2.0),), tool="latency"))


def test_vllms_detailed_result_becomes_requests() -> None:
    result = {
        "duration": 3.0, "failed": 1, "start_times": [1.0, 2.0], "latencies": [0.5, 0.0],
        "input_lens": [10, 10], "output_lens": [3, 0], "ttfts": [0.1, 0.0],
        "itls": [[0.2, 0.2], []], "errors": ["", "refused"],
    }  # fmt: skip
    found = seen_of(result)
    assert found.requests == [Request(1.0, 0.5, 10, 3, 0.1, (0.2, 0.2))]
    assert (found.seconds, found.failed) == (3.0, 1)


class Counting:
    """A decoder whose next token is the number of tokens so far."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def reset(self) -> None:
        self.calls = []

    def run(self, tokens: list[int]) -> int:
        self.calls.append(list(tokens))
        return sum(map(len, self.calls))


def test_the_loop_feeds_each_token_back_and_times_every_gap() -> None:
    decoder = Counting()
    found = one_request(decoder, [7, 8, 9], 4)
    assert decoder.calls == [[7, 8, 9], [3], [4], [5]]
    assert (found.input_len, found.output_len, len(found.itls)) == (3, 4, 3)
    assert found.ttft + sum(found.itls) == pytest.approx(found.latency)


def test_prompts_follow_the_seed() -> None:
    assert prompts(50, ASKED, 1).tolist() == prompts(50, ASKED, 1).tolist()
    assert prompts(50, ASKED, 1).tolist() != prompts(50, ASKED, 2).tolist()
    assert prompts(50, ASKED, 1).shape == (4, 10)


SMALL = ["--num-prompts", 2, "--input-len", 8, "--output-len", 4, "--repeat", 1, "--threads", 1,
         "--max-other-load", 100, "--max-steal", 100]  # fmt: skip


def test_models_with_other_vocabularies_are_invalid_and_show_no_figure(
    gblm: Callable[..., Outcome], tiny: Path, tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other", vocab_size=300)
    done = gblm("bench", "models", f"hf:{tiny}", f"hf:{other}", *SMALL, "--output", "r.json")
    assert done.code == 5, done
    assert "tiny and other had different prompts" in done.err
    assert done.out.count("INVALID") >= 2
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["valid"] is False
    assert record["command"].startswith("gblm bench models")
    assert str(tmp_path) not in record["command"]


@pytest.mark.vllm
def test_a_served_model_and_a_loop_are_measured_alike(
    gblm: Callable[..., Outcome], tiny: Path, pack_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    done = gblm(
        "bench", "models", f"served={tiny}", f"loop=hf:{pack_tiny()}", *SMALL, "--slo",
        "mlperf-llama3.1-8b", "--output", "r.json", "--log", "log", "--", *OPTIONS,
        VLLM_CPU_KVCACHE_SPACE="1",
    )  # fmt: skip
    assert done.code == 0, (done, (tmp_path / "log").read_text()[-3000:])
    record = json.loads((tmp_path / "r.json").read_text())
    assert (record["valid"], record["reasons"]) == (True, [])
    assert [run["side"] for run in record["runs"]] == ["served", "loop"]
    for run in record["runs"]:
        known = run["metrics"]
        assert known["ttft_ms_p50"] <= known["e2e_ms_p50"] <= known["e2e_ms_p99"]
        assert known["peak_memory_mb"] >= known["memory_mb"] > 0
        assert known["load_s"] > 0
    served = record["runs"][0]["evidence"]
    assert (served["preemptions"], served["cached"], served["completed"]) == (0, 0, 2)
    assert record["rows"][1]["ratio"]["tpot_ms_p50"]["median"] > 0
    assert "HTTP" in record["caveats"][0]
    assert "served" in done.out
