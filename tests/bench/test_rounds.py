"""`gblm bench A B`: order, judgement and record on sides that are made up; real ones at the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import click
import psutil
import pytest
from conftest import Outcome, in_place_of_vllm, save_tiny_model
from vllm_server import OPTIONS

from gblm.bench import rounds
from gblm.bench.engines import parse_sides
from gblm.bench.loop import Decoder, prompts
from gblm.bench.requests import Load, Request, Seen
from gblm.bench.rounds import bench, one_round, order, record_of, rows_of
from gblm.bench.server import seen_of
from gblm.bench.sides import Setup, Side
from gblm.commands.bench import sides as command
from gblm.commands.common import commas, whole_number
from gblm.errors import InputError, UsageError
from gblm.record import Record

LOAD = Load(num_prompts=4, prompt_len=10, output_len=5)
SETUP = Setup((LOAD,), Path("log"))


class Fake(Side):
    """A side that says what it is told to, and writes down what is done with it."""

    def __init__(self, name: str, diary: list[str], setup: Setup = SETUP) -> None:
        super().__init__(name, "vllm", Path(__file__), setup)
        self.diary = diary

    def check(self) -> None: ...

    def start(self) -> None:
        self.diary.append(f"start {self.name}")

    def load(self, load: Load) -> Seen:
        self.diary.append(f"{self.name} {load.concurrency}")
        return seen(0.01)

    def stop(self) -> None:
        self.diary.append(f"stop {self.name}")

    @property
    def process(self) -> psutil.Process:
        return psutil.Process()


def seen(tpot: float, **changed: Any) -> Seen:
    """Four requests one after the other, each token taking so many seconds."""
    latency = 0.1 + 4 * tpot
    requests = [Request(i * latency, latency, 10, 5, 0.1, (tpot,) * 4) for i in range(4)]
    return Seen(requests, 4 * latency, **({"prompts": "vllm:a"} | changed))


def record(*rounds: dict[str, Seen], allow_noise: bool = False) -> Record:
    setup = replace(SETUP, rounds=len(rounds), allow_noise=allow_noise)
    sides = [Fake(name, [], setup) for name in rounds[0]]
    return record_of(sides, {LOAD: list(rounds)}, {})


def test_ratios_are_paired_by_round() -> None:
    found = record(
        {"a": seen(0.010), "b": seen(0.020)},
        {"b": seen(0.090), "a": seen(0.030)},
        {"a": seen(0.020), "b": seen(0.080)},
    )
    assert found.verdict.valid is True
    assert found.value("b", LOAD.words, "tpot_ms_p50") == pytest.approx(80)
    ratio = found.ratio("b", LOAD.words, "tpot_ms_p50")
    assert ratio is not None
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((3, 2, 4))
    row = found.row("b", LOAD.words, "decode_tok_s")
    assert row is not None
    assert (row.unit, row.rounds) == ("tok/s", pytest.approx((50, 1 / 0.09, 12.5)))


def test_a_side_that_did_other_work_gets_no_figure_and_takes_the_verdict_with_it() -> None:
    found = record(
        {"a": seen(0.01), "b": seen(0.02), "c": seen(0.03)},
        {"a": seen(0.01), "b": seen(0.02, preemptions=2.0), "c": seen(0.03)},
    )
    assert found.verdict.valid is False
    assert found.verdict.reasons == (
        f"b, {LOAD.words}, round 2: 2 preemptions: the key-value cache is too small for this load",
    )
    assert {row.side for row in found.rows} == {"a", "c"}
    assert found.ratio("b", LOAD.words, "tpot_ms_p50") is None
    ratio = found.ratio("c", LOAD.words, "tpot_ms_p50")
    assert ratio is not None
    assert ratio.median == pytest.approx(3)


def test_other_prompts_condemn_every_side() -> None:
    found = record({"a": seen(0.01), "b": seen(0.02, prompts="vllm:b")})
    assert found.rows == ()
    assert len(found.verdict.reasons) == 2


def test_a_side_without_successful_requests_is_recorded_not_a_crash() -> None:
    found = record({"a": seen(0.01), "b": Seen((), 1.0, failed=4)})
    assert "0 of 4 requests succeeded" in found.verdict.reasons[0]


def test_a_noisy_round_is_left_out_for_all_sides() -> None:
    noisy = {"steal": 0.5}
    found = record(
        {"a": seen(0.010), "b": seen(0.020)},
        {"a": seen(0.010), "b": seen(0.900, noise=noisy)},
        {"a": seen(0.020), "b": seen(0.080)},
    )
    assert found.verdict.valid is True
    row = found.row("a", LOAD.words, "tpot_ms_p50")
    assert row is not None
    assert row.rounds == pytest.approx((10, 20))
    (note,) = [note for note in found.verdict.notes if "left out" in note]
    assert note.startswith(f"{LOAD.words}: round 2 is left out: b: 50.0% of the CPU time was")


def test_where_most_rounds_are_noisy_no_figure_stands() -> None:
    quiet, noisy = {"a": seen(0.01)}, {"a": seen(0.01, noise={"other_load": 0.3})}
    assert record(quiet, noisy).verdict.valid is True
    found = record(quiet, noisy, noisy)
    assert found.rows == ()
    assert "only 1 of 3 rounds were quiet; a: 30.0% of the CPU" in found.verdict.reasons[0]
    assert record(quiet, noisy, noisy, allow_noise=True).verdict.valid is True


def test_a_metric_that_one_round_lacks_has_no_row() -> None:
    rows, _, _ = rows_of(LOAD, [{"a": seen(0.01, extra={"memory_mb": 1.0})}, {"a": seen(0.01)}])
    assert "memory_mb" not in {row.metric for row in rows}


def test_what_makes_figures_less_than_they_look_is_said() -> None:
    found = record({"a": seen(0.01), "b": seen(0.02)}).verdict.notes
    assert any("raise --rounds to 6" in words for words in found)
    assert any("memory was not checked" in words for words in found)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_no_side_always_stands_before_another(count: int) -> None:
    sides = [Fake(str(n), []) for n in range(count)]
    orders = [[s.name for s in order(sides, number)] for number in range(2 * count)]
    for a, b in permutations([s.name for s in sides], 2):
        before = sum(o.index(a) < o.index(b) for o in orders)
        assert before == count
    assert len({o[0] for o in orders}) == count


def test_all_sides_stay_and_alternate_under_each_load() -> None:
    diary: list[str] = []
    loads = (LOAD, Load(4, 10, 5, concurrency=2))
    setup = Setup(loads, Path("log"), rounds=2, allow_noise=True)
    sides = [Fake("a", diary, setup), Fake("b", diary, setup)]
    found = bench(sides)
    assert diary == ["start a", "start b", "a 1", "b 1", "a 2", "b 2", "b 1", "a 1", "b 2", "a 2",
                     "stop b", "stop a"]  # fmt: skip
    assert found.loads[0] == LOAD.words


def test_a_side_may_have_fewer_loads_than_the_first() -> None:
    other = replace(LOAD, concurrency=2)
    diary: list[str] = []
    sides = [
        Fake("A", diary, replace(SETUP, loads=(LOAD, other))),
        Fake("B", diary, replace(SETUP, loads=(LOAD,))),
    ]
    for turned in (sides, sides[::-1]):
        found = one_round(turned, lambda: None, lambda: None)
        assert {load: {*by_side} for load, by_side in found.items()} == {
            LOAD: {"A", "B"}, other: {"A"},
        }  # fmt: skip


def test_slow_memory_is_waited_for_but_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = iter([40.0, 30.0, 33.0, 41.0, *[20.0] * rounds.PATIENCE, 42.0])
    monkeypatch.setattr(rounds, "SETTLE_SECONDS", 0)
    monkeypatch.setattr(rounds.native, "refusal", lambda: None)
    monkeypatch.setattr(rounds.noise, "reader", lambda *_: lambda: next(speeds))
    read = rounds.reader(1)
    assert [read() for _ in range(4)] == [40.0, 41.0, 20.0, 42.0]


@pytest.mark.parametrize(("allow", "tries"), [(False, [2, 3, 1]), (True, [1, 1, 1])])
def test_a_noisy_load_runs_again_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch, allow: bool, tries: list[int]
) -> None:
    stolen = iter([0.5, 0.0, *[0.5] * rounds.TRIES, 0.0])
    monkeypatch.setattr(rounds.noise, "measured", lambda _: nullcontext({"steal": next(stolen)}))
    diary: list[str] = []
    setup = replace(SETUP, rounds=3, allow_noise=allow)
    side = Fake("a", diary, setup)
    found = [one_round([side], lambda: None, lambda: None)[LOAD]["a"] for _ in tries]
    assert [seen.noise["tries"] for seen in found] == tries
    assert len(diary) == sum(tries)
    notes = record_of([side], {LOAD: [{"a": seen} for seen in found]}, {}).verdict.notes
    told = [note for note in notes if "made again" in note]
    assert told == ([] if allow else ["3 of 6 runs of a load were noisy and made again."])


def test_where_noise_is_allowed_slow_memory_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patience: list[int] = []
    monkeypatch.setattr(rounds, "reader", lambda _, most: patience.append(most) or (lambda: None))
    for allow in (False, True):
        rounds.bench([Fake("A", [], replace(SETUP, rounds=1, allow_noise=allow))])
    assert patience == [rounds.PATIENCE, 1]


def test_with_restart_one_side_at_a_time_is_there() -> None:
    diary: list[str] = []
    setup = replace(SETUP, restart=True, allow_noise=True)
    sides = [Fake(name, diary, setup) for name in "ab"]
    found = one_round(sides, lambda: 9.0, lambda: None)
    assert diary == ["start a", "a 1", "stop a", "start b", "b 1", "stop b"]
    assert found[LOAD]["b"].noise["read_limit_gb_s"] == 9.0


CONTEXT, OPTION = click.Context(command), click.Option(["--x"])


@pytest.mark.parametrize("text", ["1.5", "0", "1,x", "nan", "-1", "", "inf"])
def test_concurrency_is_a_list_of_whole_numbers(text: str) -> None:
    assert commas(whole_number)(CONTEXT, OPTION, "4,1,4") == (4, 1)
    with pytest.raises(click.BadParameter, match="is not a positive whole number"):
        commas(whole_number)(CONTEXT, OPTION, text)


def test_sides_are_named_and_their_engine_is_guessed(tiny: Path, tmp_path: Path) -> None:
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    words = [str(tiny), f"loop=transformers:{tiny}", str(gguf), f"q8=llama.cpp:{gguf}"]
    found = parse_sides(words, SETUP)
    assert [(s.name, s.engine) for s in found] == [
        ("tiny", "vllm"), ("loop", "transformers"), ("x.gguf", "llama.cpp"), ("q8", "llama.cpp"),
    ]  # fmt: skip
    assert found[2].facts() == {
        "engine": "llama.cpp", "folder": "x.gguf", "bytes": 4, "threads": None,
    }  # fmt: skip


def test_sides_that_are_none_are_refused(tiny: Path) -> None:
    with pytest.raises(UsageError, match="give a model"):
        parse_sides([], SETUP)
    with pytest.raises(UsageError, match="two sides are called 'tiny'"):
        parse_sides([str(tiny), f"transformers:{tiny}"], SETUP)
    with pytest.raises(InputError, match="no such file"):
        parse_sides([str(tiny), "llama.cpp:./nothing.gguf"], SETUP)
    with pytest.raises(UsageError, match="NAME="):
        parse_sides([str(tiny), "x=transformers:"], SETUP)
    with pytest.raises(UsageError, match="go to vLLM, in which no side runs"):
        parse_sides([f"transformers:{tiny}"], replace(SETUP, options=("--dtype", "float32")))
    with pytest.raises(UsageError, match="'fast' is unknown"):
        parse_sides([str(tiny)], replace(SETUP, backend="fast"))
    with pytest.raises(UsageError, match="no side is one"):
        parse_sides([str(tiny)], replace(SETUP, backend="dense"))


@pytest.mark.parametrize(
    ("engine", "load", "sentence"),
    [
        ("transformers", Load(4, 10, 5, concurrency=2), "runs one request at a time"),
        ("onnx", Load(4, 10, 5, concurrency=2), "runs one request at a time"),
    ],
)
def test_what_an_engine_cannot_have_is_refused_before_anything_starts(
    tiny: Path, engine: str, load: Load, sentence: str
) -> None:
    with pytest.raises(UsageError, match=sentence):
        parse_sides([f"{engine}:{tiny}"], Setup((load,), Path("log")))


def test_vllms_detailed_result_becomes_requests() -> None:
    result = {
        "duration": 3.0, "start_times": [1.0, 2.0], "latencies": [0.5, 0.0],
        "input_lens": [10, 10], "output_lens": [3, 0], "ttfts": [0.1, 0.0],
        "itls": [[0.2, 0.2], []], "errors": ["", "refused"],
    }  # fmt: skip
    found = seen_of(result)
    assert found.requests == [Request(1.0, 0.5, 10, 3, 0.1, (0.2, 0.2))]
    assert (found.seconds, found.failed) == (3.0, 1)


class Counting(Decoder):
    """A decoder whose next token is the number of tokens so far."""

    vocabulary = 10

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def reset(self) -> None:
        self.calls = []

    def run(self, tokens: Any) -> int:
        self.calls.append(list(tokens))
        return sum(map(len, self.calls))


def test_the_loop_feeds_each_token_back_and_times_every_gap() -> None:
    decoder = Counting()
    (found,) = decoder.generate([[7, 8, 9]], 4, 1)
    assert decoder.calls == [[7, 8, 9], [3], [4], [5]]
    assert (found.input_len, found.output_len, len(found.itls)) == (3, 4, 3)
    assert found.ttft is not None
    assert found.ttft + sum(found.itls) == pytest.approx(found.latency)


def test_prompts_are_the_same_for_all_sides() -> None:
    assert prompts(50, LOAD).tolist() == prompts(50, LOAD).tolist()
    assert prompts(50, LOAD).shape == (4, 10)


SMALL = ["--num-prompts", 2, "--prompt-len", 8, "--output-len", 4, "--threads", 1,
         "--allow-noise", "--output", "r.json"]  # fmt: skip


@pytest.mark.slow
def test_models_with_other_vocabularies_are_invalid_and_show_no_figure(
    gblm: Callable[..., Outcome], tiny: Path, tmp_path: Path
) -> None:
    other = save_tiny_model(tmp_path / "other", vocab_size=300)
    done = gblm("bench", f"transformers:{tiny}", f"transformers:{other}", *SMALL, "--rounds", 1)
    assert done.code == 5, done
    assert "tiny and other had different prompts" in done.err
    found = Record.read(tmp_path / "r.json")
    assert (found.verdict.valid, found.rows) == (False, ())
    assert found.command.startswith("gblm bench transformers:tiny transformers:other")


def test_a_loop_that_fails_is_one_sentence(
    gblm: Callable[..., Outcome], tiny: Path, tmp_path: Path
) -> None:
    gguf = tmp_path / "x.gguf"
    gguf.write_bytes(b"GGUF")
    done = gblm("bench", gguf, *SMALL, "--rounds", 1)
    assert done.code == 3, done
    assert "\ngblm: error: x.gguf: llama.cpp ended with code 1: " in done.err


@pytest.mark.vllm
def test_a_server_that_cannot_start_is_one_sentence(
    gblm: Callable[..., Outcome], tiny: Path, tmp_path: Path
) -> None:
    """In vLLM's place a process that refuses what it is asked for."""
    paths = in_place_of_vllm(tmp_path, "os.write(2, b'ValueError: no such length'); os._exit(1)")
    done = gblm("bench", tiny, *SMALL, "--rounds", 1, PYTHONPATH=paths)
    assert done.code == 3, done
    assert "the server ended with code 1: ValueError: no such length" in done.err


# A loop and exported folders: tests/export/test_onnx_bench.py.
@pytest.mark.vllm
def test_a_served_model_and_vllm_offline_are_measured_alike(
    gblm: Callable[..., Outcome], tiny: Path, pack_tiny: Callable[..., Path], tmp_path: Path,
    best_backend: str,
) -> None:  # fmt: skip
    done = gblm(
        "bench", f"served={pack_tiny()}", f"offline=vllm-offline:{tiny}", *SMALL,
        "--rounds", 1, "--num-prompts", 8, "--concurrency", 2, "--", *OPTIONS,
        VLLM_CPU_KVCACHE_SPACE="1",
    )  # fmt: skip
    assert done.code == 0, done
    found = Record.read(tmp_path / "r.json")
    assert found.verdict.valid
    assert list(found.sides["served"]["linears_by_backend"]) == [best_backend]
    assert "HTTP" in found.verdict.notes[0]
    for side in found.sides:
        known = {row.metric: row.value for row in found.rows if row.side == side}
        assert known["ttft_ms_p50"] <= known["e2e_ms_p50"] <= known["e2e_ms_p99"]
        assert min(known["memory_mb"], known["load_s"], known["output_tok_s"]) > 0
