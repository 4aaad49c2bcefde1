"""The whole GPU check: its minutes, its record, its lines and tables, the command, the device."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click.testing
import pytest
import torch
from gpu_place import CpuPlace

from gblm.cli import cli
from gblm.errors import InputError, MachineError
from gblm.evaluate.side_by_side import compare
from gblm.gpu_check import check
from gblm.gpu_check.check import SHARES, Sizes, gpu_check
from gblm.gpu_check.correctness import Cases
from gblm.gpu_check.decode import ModelShape
from gblm.gpu_check.lines import LINES, judge
from gblm.gpu_check.place import Cuda
from gblm.gpu_check.pruning import LayerShape
from gblm.gpu_check.table import tables
from gblm.kernels import BACKENDS
from gblm.kernels.cuda import tuning
from gblm.kernels.reference import Reference
from gblm.report.markdown import markdown
from gblm.report.page import html
from gblm.report.sources import read_sources

SMALL = Sizes(
    bandwidth={"size": 1 << 10, "side": 8},
    cases=Cases(specs=("nm/2:4",), shapes=((8, 64),), dtypes=(torch.bfloat16,), tokens=(1,)),
    times={"shapes": {"7b gate_up": (32, 128)}, "tokens": (1, 256), "specs": ("nm/2:4",)},
    model=ModelShape(layers=1, hidden=128, inner=128, heads=2, vocabulary=20, context=4),
    decode={"batches": (1,), "specs": ("nm/2:4", "nm/2:4/int8:128")},
    layer=LayerShape(32, 64, 16),
    tools=(),
)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    here = CpuPlace({"reference": Reference(), "semi_structured plentiful": BACKENDS["dense"]})
    return gpu_check(8, here, SMALL)


def test_a_record_has_every_section_and_is_json(record: dict[str, Any]) -> None:
    again = json.loads(json.dumps(record))
    assert again["kind"] == "gpu check"
    assert again["provenance"]["packages"]["torch"]
    assert list(again["sections"]) == list(SHARES)
    for name, section in again["sections"].items():
        assert section["failed"] == [], name
        assert bool(section["rows"]) == (name != "sanitizer"), name


def test_the_shares_are_all_of_the_time() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)


def test_time_that_a_section_leaves_goes_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    left: dict[str, float] = {}
    names = ("measure_limits", "check_products", "measure_times", "measure_decoding",
             "measure_pruning", "run_sanitizer")  # fmt: skip
    for name in names:
        monkeypatch.setattr(check, name, lambda *a, name=name, **k: left.update({
            name: next(one for one in a if hasattr(one, "seconds_left")).seconds_left
        }))  # fmt: skip
    gpu_check(10, CpuPlace({}), SMALL, clock=lambda: 100.0)
    shares = list(SHARES.values())
    assert list(left.values()) == pytest.approx(
        [600 * sum(shares[: i + 1]) for i in range(len(shares))]
    )


def test_without_time_everything_is_skipped_and_nothing_met() -> None:
    ticks = iter(range(10**6))
    found = gpu_check(1e-9, CpuPlace({"reference": Reference()}), SMALL, lambda: float(next(ticks)))
    assert all(not section["rows"] for section in found["sections"].values())
    assert {line["state"] for line in found["lines"]} == {"not measured"}
    assert all(section["skipped"] for section in found["sections"].values())


def row(label: str, tokens: int, spec: str, times: float, **more: Any) -> dict[str, Any]:
    return {
        "label": label, "tokens": tokens, "spec": spec, "contender": "mma_sp", "x_cublas": times,
        "share_of_read": times / 2, **more,
    }  # fmt: skip


def test_lines_are_met_by_the_worst_size_of_the_best_backend() -> None:
    rows = [
        row("7b gate_up", 1, "nm/2:4", 1.4),
        row("7b gate_up", 1, "nm/2:4", 1.8, contender="triton"),
        row("7b gate_up", 1, "nm/2:4", 9.9, contender="cutlass"),
        row("70b gate_up", 16, "nm/2:4", 9.9, contender="cusparselt"),
        row("70b gate_up", 16, "nm/2:4", 1.55),
        row("70b gate_up", 4, "nm/2:4/fp8:128", 2.7),
        row("7b down", 1, "nm/2:4/fp8:128", 2.8, contender="triton"),
        row("7b o", 1, "nm/2:4", 0.1),
        row("7b gate_up", 64, "nm/2:4", 0.1),
        row("7b down", 1, "bitmask/0.5", 1.2),
        *(row("7b o", m, "nm/2:4", x, contender="semi_structured plentiful")
          for m, x in ((1, 0.1), (256, 0.97), (4096, 1.3))),
    ]  # fmt: skip
    correct = [{"backend": "a", "error": 5e-4, "replays": True},
               {"backend": "b", "error": 2e-3, "replays": True},
               {"backend": "cublas bf16", "error": 9.0, "replays": False}]  # fmt: skip
    decode = [{"spec": "nm/2:4", "batch": 1, "x_dense": 1.5},
              {"spec": "nm/2:4", "batch": 8, "x_dense": 0.5}]  # fmt: skip
    sections = {"times": {"rows": rows}, "correctness": {"rows": correct},
                "decode": {"rows": decode}}  # fmt: skip
    found = {line["line"]: (line["value"], line["state"]) for line in judge(sections)}
    assert list(found.values()) == [
        (2e-3, "missed"),
        (1.0, "met"),
        (None, "not measured"),
        (1.55 / 2, "missed"),
        (1.55, "met"),
        (None, "not measured"),
        (2.7, "met"),
        (None, "not measured"),
        (1.2, "missed"),
        (None, "not measured"),
        (0.97, "missed"),
        (1.3, "met"),
        (1.5, "met"),
        (None, "not measured"),
    ]


def test_a_report_shows_times_lines_and_what_failed(record: dict[str, Any], tmp_path: Path) -> None:
    record = json.loads(json.dumps(record))
    sections = record["sections"] | {"sanitizer": {"rows": [], "failed": ["x: y"], "skipped": []}}
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(record | {"sections": sections}))
    facts = read_sources([path], []).facts
    rows = [*sections["times"]["rows"], *sections["decode"]["rows"]]
    assert len(facts.timed) == len(rows) == 10
    one = next(t for t in facts.timed if t.name == "reference nm/2:4 *" and t.tokens == 256)
    same = next(r for r in rows if r["contender"] == "reference" and r.get("tokens") == 256)
    assert one.table == "7b gate_up, 32×128"
    assert (one.microseconds, one.ratio) == (same["us"], same["x_cublas"])
    assert one.share == same["share_of_read"] > 0
    measured = [line for line in record["lines"] if line["state"] != "not measured"]
    assert [(c.what, c.passed) for c in facts.checks] == [
        (line["line"], line["state"] == "met") for line in measured
    ]
    device = record["provenance"]["device"]
    assert len(facts.notes) == len(LINES) - len(measured) + 1
    assert f"{device}: sanitizer failed: x: y" in facts.notes
    for text in (markdown(read_sources([path], []), "x"), html(read_sources([path], []), "x")):
        assert "7b gate" in text
        assert f"{one.share:.0%}" in text
    del sections["times"]["rows"][0]["us"]
    path.write_text(json.dumps(record | {"sections": sections}))
    with pytest.raises(
        InputError, match="not a record of kind 'gpu check' as gblm writes it: 'us'"
    ):
        read_sources([path], [])


def test_two_records_of_one_gpu_stand_side_by_side(record: dict[str, Any], tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    faster = json.loads(json.dumps(record))
    for row in faster["sections"]["times"]["rows"]:
        row["us"] /= 2
    for path, one in zip(paths, (record, faster), strict=True):
        path.write_text(json.dumps(one))
    found = {row["what"]: row for row in compare(*paths)["rows"]}
    assert found["µs, reference nm/2:4, 7b gate_up, 1 tokens"]["ratio"] == 0.5
    assert found["tokens/s, cublas bf16, batch 1"]["ratio"] == 1
    for line in record["lines"]:
        assert found[line["line"]]["a"] == found[line["line"]]["b"] == line["value"]
    faster["provenance"]["device"] = "another GPU"
    paths[1].write_text(json.dumps(faster))
    with pytest.raises(InputError, match="different protocols"):
        compare(*paths)


def test_tables_hold_every_line_and_every_time(record: dict[str, Any]) -> None:
    found = list(tables(record))
    lines, times, decode, pruning, sections = found
    assert len(lines[1]) == len(LINES)
    assert times[0] == ["7b gate_up 32x128, tokens:", "1", "256"]
    assert [cells[0] for cells in times[1]] == [
        "cublas bf16", "cublas fp8", "reference nm/2:4", "semi_structured plentiful nm/2:4",
    ]  # fmt: skip
    assert times[1][3][1] == "–"
    assert times[1][3][2].endswith("x*")
    assert len(decode[1]) == 3
    assert len(pruning[1]) == 8
    assert [cells[0] for cells in sections[1]] == list(SHARES)
    for header, rows in found:
        assert all(len(cells) == len(header) for cells in rows)


def run(*words: str) -> click.testing.Result:
    return click.testing.CliRunner().invoke(cli, ["doctor", *words], obj={})


def test_the_command_writes_the_record_and_prints_the_tables(
    record: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def measured(minutes: float) -> dict[str, Any]:
        asked.append(minutes)
        return record

    monkeypatch.setattr(check, "gpu_check", measured)
    done = run("--gpu-check", "--output", str(tmp_path / "sub" / "record.json"))
    assert (done.exit_code, asked) == (0, [8.0]), done.output
    assert "compute-sanitizer finds nothing" in done.output
    assert "7b gate_up 32x128" in done.output
    kept = json.loads((tmp_path / "sub" / "record.json").read_text())
    assert kept["lines"] == record["lines"]
    assert run("--gpu-check", "--minutes", "0.5", "--json").exit_code == 0
    assert asked == [8.0, 0.5]


@pytest.mark.parametrize("words", [["--minutes", "3"], ["--output", "x.json"]])
def test_options_of_the_check_need_it(words: list[str]) -> None:
    done = run(*words)
    assert done.exit_code == 2
    assert "belong to --gpu-check" in done.output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_refuses_in_one_sentence() -> None:
    done = run("--gpu-check")
    assert isinstance(done.exception, MachineError)
    assert str(done.exception) == "the GPU check needs a CUDA device; PyTorch sees none."
    assert done.exception.exit_code == 3


class FakeEvent:
    """Time of the host."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1e3 * (end.at - self.at)


class FakeGraph:
    """Replays the calls of the capture."""

    def replay(self) -> None:
        self.replays = getattr(self, "replays", 0) + 1


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the check asks of torch.cuda, without a device."""
    state = SimpleNamespace(capturable=True, captures=0, graphs=[])

    @contextmanager
    def graph(made: FakeGraph) -> Iterator[None]:
        state.captures += 1
        state.graphs.append(made)
        yield
        if not state.capturable:
            raise RuntimeError("operation not permitted when stream is capturing")

    properties = SimpleNamespace(multi_processor_count=132, L2_cache_size=1 << 10)
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device: properties,
        "get_device_capability": lambda device: (9, 0),
        "get_device_name": lambda device: "A GPU",
        "mem_get_info": lambda device: (1, 2),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "Event": FakeEvent,
        "CUDAGraph": FakeGraph,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return state


@pytest.mark.parametrize("capturable", [True, False])
def test_a_cuda_device_times_replays_of_one_graph(
    fake_cuda: SimpleNamespace, capturable: bool
) -> None:
    fake_cuda.capturable, here, called = capturable, Cuda(), []
    calls: list[Callable[[], object]] = [lambda: called.append(1), lambda: called.append(2)]
    timing = here.time(calls)
    assert timing.captured is capturable
    assert 0 <= timing.low <= timing.seconds <= timing.high
    assert fake_cuda.captures == 1
    assert set(called[0::2]) == {1}
    assert getattr(fake_cuda.graphs[0], "replays", 0) == (8 if capturable else 0)
    here.synchronize()
    here.release()


def test_a_cuda_device_replays_over_nan(fake_cuda: SimpleNamespace) -> None:
    out = torch.ones(3)
    replayed = Cuda().replayed(lambda: out)
    # Nothing wrote it again: the graph is a fake.
    assert bool(replayed.isnan().all())


def test_a_cuda_device_knows_its_facts_and_all_backends_for_it(fake_cuda: SimpleNamespace) -> None:
    here = Cuda()
    assert set(here.backends) == {
        "semi_structured plentiful",
        "cusparselt",
        "cutlass",
        *(name for name, backend in BACKENDS.items() if backend.needs == "cuda"),
    }
    assert here.cold_bytes == 3 << 10
    assert here.facts()["capability"] == "9.0"
    assert json.dumps(here.facts())
    tuning.tuner.cache_clear()
    tuning.tuner(0).settled[("a", 1)] = "tiles"
    assert here.answers() == {"a 1": "tiles"}
    tuning.tuner.cache_clear()


def test_the_autotuners_timer_and_facts(fake_cuda: SimpleNamespace) -> None:
    called: list[int] = []
    seconds = tuning.EventTimer(torch.device("cpu"))(lambda: called.append(1))
    assert 0 <= seconds < 10
    assert len(called) == tuning.WARM_UP + tuning.REPEATS
    facts = tuning.facts(torch.device("cpu"))
    assert facts[:3] == ("A-GPU", "sm_90", f"torch-{torch.__version__}")
    assert all(" " not in str(fact) for fact in facts)
