"""GuideLLM as load generator: what it is asked, what its report becomes; itself where it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

from gblm.bench import guidellm
from gblm.bench.models import Plan
from gblm.bench.requests import metrics_of
from gblm.bench.sides import Side
from gblm.bench.validity import Asked
from gblm.errors import MachineError

ASKED = Asked(num_prompts=3, input_len=10, output_len=5, concurrency=2)


def row(prompt: str, start: float, latency: float, ok: bool = True) -> dict:
    return {
        "request_args": json.dumps({"body": {"prompt": prompt}}),
        "request_start_time": start,
        "request_latency": latency,
        "info": {
            "status": "completed" if ok else "errored",
            "timings": {"first_token_iteration": start + 0.1 if ok else None},
        },
        "input_metrics": {"text_tokens": 10},
        "output_metrics": {"text_tokens": 5},
    }


def report(*good: dict, errored: tuple[dict, ...] = ()) -> dict:
    return {"benchmarks": [{"requests": {"successful": list(good), "errored": list(errored)}}]}


def test_requests_of_the_warm_up_do_not_count() -> None:
    rows = [row("c", 102.0, 0.5), row("b", 101.0, 0.3), row("a", 101.5, 0.5), row("w", 100.0, 9.0)]
    seen = guidellm.seen_of(report(*rows), skip=1)
    assert [r.start for r in seen.requests] == [0.5, 0.0, 1.0]  # in the order of the prompts
    assert (seen.seconds, seen.failed) == (1.5, 0)
    assert metrics_of(seen.requests, seen.seconds)["ttft_ms_p50"] == pytest.approx(100)
    assert metrics_of(seen.requests, seen.seconds)["tpot_ms_p99"] == pytest.approx(100, rel=0.01)


def test_the_same_prompts_have_the_same_fingerprint_in_any_order() -> None:
    one = guidellm.seen_of(report(row("a", 1.0, 1.0), row("b", 2.0, 1.0)), skip=0)
    two = guidellm.seen_of(report(row("b", 7.0, 1.0), row("a", 8.0, 1.0)), skip=0)
    other = guidellm.seen_of(report(row("a", 1.0, 1.0), row("c", 2.0, 1.0)), skip=0)
    assert one.prompts == two.prompts != other.prompts
    assert one.prompts.startswith("guidellm:")


def test_failed_requests_are_counted_and_left_out() -> None:
    failed = row("b", 2.0, 1.0, ok=False)
    seen = guidellm.seen_of(report(row("a", 1.0, 1.0), errored=(failed,)), skip=0)
    assert (len(seen.requests), seen.failed) == (1, 1)


@pytest.mark.parametrize(
    ("concurrency", "rate", "wanted"),
    [
        (2, None, {"kind": "concurrent", "streams": 2}),
        (None, None, {"kind": "throughput"}),
        (None, 4.0, {"kind": "poisson", "rate": 4.0}),
        (8, 4.0, {"kind": "poisson", "rate": 4.0, "max_concurrency": 8}),
    ],
)
def test_loads_in_its_words(concurrency: int | None, rate: float | None, wanted: dict) -> None:
    asked = Asked(3, 10, 5, concurrency, rate)
    assert guidellm.profile(asked) == wanted
    words = guidellm.options("http://x", Path("/model"), asked, 7, Path("/out"))
    assert f"kind=max_requests,count={3 + (concurrency or 1)}" in words
    assert "kind=static,value=7" in words
    assert json.loads(words[words.index("--profile") + 1]) == wanted


def test_its_absence_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(guidellm.VARIABLE, "/nowhere/guidellm")
    side = Side("a", "vllm", Path(__file__))
    with pytest.raises(MachineError, match="pip install guidellm"):
        Plan((ASKED,), tool="guidellm").check([side, side])


@pytest.mark.vllm
def test_a_real_run(gblm: Callable[..., Outcome], tiny: Path, tmp_path: Path) -> None:
    try:
        guidellm.program()
    except MachineError as error:
        pytest.skip(str(error))
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    record = tmp_path / "bench.json"
    done = gblm(
        "bench", "models", tiny, copy, "--with", "guidellm", "--num-prompts", 4, "--repeat", 1,
        "--input-len", 8, "--output-len", 4, "--concurrency", 2, "--max-other-load", 100,
        "--max-steal", 100, "--output", record, "--", "--enforce-eager", "--max-model-len", 256,
    )  # fmt: skip
    assert record.exists(), done
    found = json.loads(record.read_text())
    assert [r for r in found["reasons"] if "requests in flight" not in r] == []
    assert found["rows"][1]["metrics"]["ttft_ms_p50"]["median"] > 0
