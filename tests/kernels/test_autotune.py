"""What the autotuner promises: its choice, when it measures, and what a bad file can do to it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from gblm.kernels import autotune
from gblm.kernels.autotune import Answers, Autotuner, fastest, never_slower

KEY = (4096, 4096, "bfloat16", 128)


class Bench:
    """Candidates with known times, and whether they were measured."""

    def __init__(self, folder: Path, **seconds: float | Exception) -> None:
        self.folder, self.seconds = folder, seconds
        self.measured: list[str] = []
        self.capturing = False

    def tuner(self, *facts: str | int) -> Autotuner:
        answers = Answers(self.folder / "autotune.json")
        return Autotuner(answers, facts or ("H100",), self.time, lambda: self.capturing)

    def time(self, call: Callable[[], object]) -> float:
        found = call()
        assert isinstance(found, float)
        return found

    def make(self, name: str) -> Callable[[], object]:
        self.measured.append(name)
        seconds = self.seconds[name]
        if isinstance(seconds, Exception):
            raise seconds
        return lambda: seconds

    def choose(self, tuner: Autotuner, key: autotune.Key = KEY, default: str = "tiles") -> str:
        return tuner.choose(key, list(self.seconds), self.make, default)


@pytest.mark.parametrize(
    ("seconds", "winner"),
    [
        ({"a": 2.0, "b": 1.0, "c": 3.0}, "b"),
        ({"a": 1.019, "b": 1.0}, "a"),
        ({"a": 1.021, "b": 1.0}, "b"),
        ({"a": 1.0, "b": 1.0}, "a"),
        ({"a": 1.0}, "a"),
    ],
)
def test_the_fastest_wins_and_close_to_it_the_first(seconds: dict[str, float], winner: str) -> None:
    assert fastest(seconds) == winner


@pytest.mark.parametrize(
    ("library", "other", "winner"),
    [
        ([1.0, 1.0, 0.5], [9.0, 9.0, 9.0], "library"),
        ([1.019, 1.0, 0.5], [9.0, 9.0, 9.0], "library"),
        ([1.03, 0.1, 0.1], [9.0, 9.0, 9.0], "dense"),
        ([1.0, 1.0, 0.6], [1.0, 1.0, 0.5], "other"),
        ([1.0, 1.0, 0.99], [1.0, 1.0, 1.0], "dense"),
    ],
)
def test_a_layout_is_nowhere_slower_than_dense(
    library: Sequence[float], other: Sequence[float], winner: str
) -> None:
    times = {"dense": [1.0, 1.0, 1.0], "library": library, "other": other}
    assert never_slower(times, "dense") == winner


def test_a_question_is_measured_once_also_by_other_processes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiles=2.0, dense=1.0)
    tuner = bench.tuner()
    assert [bench.choose(tuner), bench.choose(tuner), bench.choose(bench.tuner())] == ["dense"] * 3
    assert bench.measured == ["tiles", "dense"]


@pytest.mark.parametrize("other", ["H200", "torch-2.14", "cusparselt-800"])
def test_another_machine_or_version_measures_again(tmp_path: Path, other: str) -> None:
    bench = Bench(tmp_path, tiles=2.0, dense=1.0)
    bench.choose(bench.tuner("H100", "torch-2.13", "cusparselt-700"))
    bench.seconds = {"tiles": 1.0, "dense": 2.0}
    facts = [other if fact.split("-")[0] == other.split("-")[0] else fact
             for fact in ("torch-2.13", "cusparselt-700")]  # fmt: skip
    assert bench.choose(bench.tuner(other if other[0] == "H" else "H100", *facts)) == "tiles"


@pytest.mark.parametrize("key", [(4096, 4096, "float16", 128), (4096, 4096, "bfloat16", 256)])
def test_another_question_is_measured_on_its_own(tmp_path: Path, key: autotune.Key) -> None:
    bench = Bench(tmp_path, tiles=2.0, dense=1.0)
    tuner = bench.tuner()
    bench.choose(tuner)
    bench.seconds = {"tiles": 1.0, "dense": 2.0}
    assert bench.choose(tuner, key) == "tiles"
    assert bench.choose(tuner) == "dense"


def test_nothing_is_measured_while_a_graph_is_captured(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiles=2.0, dense=1.0)
    bench.capturing, tuner = True, bench.tuner()
    assert bench.choose(tuner) == "tiles"
    assert bench.measured == []
    bench.capturing = False
    assert bench.choose(tuner) == "dense"
    bench.capturing = True
    assert bench.choose(tuner) == "dense"
    assert bench.choose(bench.tuner()) == "dense"


def test_what_cannot_run_is_left_out(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiles=2.0, cusparselt=RuntimeError("no such algorithm"), dense=1.5)
    assert bench.choose(bench.tuner()) == "dense"
    nothing = Bench(tmp_path / "other", cusparselt=RuntimeError("no such algorithm"))
    assert nothing.choose(nothing.tuner()) == "tiles"
    assert not list((tmp_path / "other").glob("*"))


def test_too_little_memory_is_no_answer_for_other_processes(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiles=1.0, dense=torch.OutOfMemoryError("out of memory"))
    tuner = bench.tuner()
    assert [bench.choose(tuner, default="dense") for _ in range(2)] == ["dense", "dense"]
    assert bench.measured == ["tiles", "dense"]
    bench.seconds = {"tiles": 1.0, "dense": 2.0}
    assert bench.choose(bench.tuner(), default="dense") == "tiles"


def test_mistakes_in_the_product_are_not_taken_for_slow_candidates(tmp_path: Path) -> None:
    bench = Bench(tmp_path, tiles=TypeError("a bug"))
    with pytest.raises(TypeError, match="a bug"):
        bench.choose(bench.tuner())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"{",
        b"[]",
        b"7",
        b'{"version": 1}',
        b'{"version": 1, "answers": []}',
        b'{"version": 2, "answers": {"H100 4096 4096 bfloat16 128": "tiles"}}',
        b'{"version": 1, "answers": {"H100 4096 4096 bfloat16 128": "unknown"}}',
        b'{"version": 1, "answers": {"H100 4096 4096 bfloat16 128": ["tiles"]}}',
        b'{"version": 1, "answers": {"H100 4096 4096 bfloat16 128": "../tiles"}}',
        b'{"version": 1, "answers": ' + b"[" * 100_000,
        b'{"version": 1, "answers": {"H100 4096 4096 bfloat16 128": "tiles"}}' + b" " * (1 << 20),
    ],
    ids=range(13),
)
def test_a_damaged_file_is_measured_anew_and_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "autotune.json").write_bytes(content)
    bench = Bench(tmp_path, tiles=2.0, dense=1.0)
    assert bench.choose(bench.tuner()) == "dense"
    assert bench.choose(bench.tuner()) == "dense"
    assert bench.measured == ["tiles", "dense"]
    kept = json.loads((tmp_path / "autotune.json").read_bytes())
    assert kept["answers"]["H100 4096 4096 bfloat16 128"] == "dense"


def test_the_file_is_bounded_and_forgets_the_oldest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "MAX_ANSWERS", 3)
    one, other = Answers(tmp_path / "a"), Answers(tmp_path / "a")
    for number in range(3):
        one.put(f"one {number}", "x")
    other.put("other", "y")
    assert [Answers(tmp_path / "a").get(key) for key in ("one 0", "one 1", "other")] == [
        None, "x", "y",
    ]  # fmt: skip


def test_the_largest_file_is_one_that_is_read(tmp_path: Path) -> None:
    content = {f"{number:0400}": "a" * 40 for number in range(autotune.MAX_ANSWERS)}
    text = json.dumps({"version": autotune.VERSION, "answers": content}, indent=0)
    assert len(text) < autotune.FILE_BYTES


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    bench = Bench(tmp_path / "file", tiles=2.0, dense=1.0)
    tuner = bench.tuner()
    assert [bench.choose(tuner), bench.choose(tuner)] == ["dense", "dense"]
    assert bench.measured == ["tiles", "dense"]
