"""What makes a run invalid: each check fails on the run that it is for, and passes a good one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gblm.bench.requests import Load, Request, Seen
from gblm.bench.rounds import check_alike, check_work

ASKED = Load(num_prompts=8, prompt_len=10, output_len=5, concurrency=1)


def requests(count: int = 8, gap: float = 1.0, latency: float = 1.0) -> list[Request]:
    """One after the other, every `gap` seconds."""
    return [Request(gap * i, latency, 10, 5, 0.2, (0.2,) * 4) for i in range(count)]


def good() -> Seen:
    return Seen(requests(), 8.0, preemptions=0, cached=0.0, prompts="vllm:a")


def reasons(asked: Load = ASKED, **changed: object) -> list[str]:
    return check_work(asked, replace(good(), **changed))


def test_a_good_run_has_no_reasons() -> None:
    assert reasons() == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"failed": 1}, "8 of 8 requests succeeded"),
        ({"requests": requests(7)}, "7 of 8 requests succeeded"),
        (
            {"requests": [replace(r, output_len=4) for r in requests()]},
            "8 of 8 answers have another length than the 5 tokens asked for, such as 4",
        ),
        ({"seconds": 20.0}, "1 requests in flight were asked for, on average there were 0.40"),
        ({"preemptions": 3.0}, "3 preemptions"),
        ({"cached": 0.5}, "50% of the prompt tokens came from the prefix cache"),
    ],
)
def test_each_flaw_is_named(changed: dict[str, object], sentence: str) -> None:
    found = reasons(**changed)
    assert len(found) == 1, found
    assert sentence in found[0]


def test_concurrency_counts_what_was_in_flight() -> None:
    four = replace(ASKED, concurrency=4)
    at_once = [Request(float(i // 4), 1.0, 10, 5, 0.2) for i in range(8)]
    assert reasons(four, requests=at_once, seconds=2.0) == []
    assert "on average there were 1.00" in reasons(four)[0]
    # More than there are prompts cannot be in flight.
    assert reasons(replace(ASKED, concurrency=100), requests=[
        Request(0.0, 1.0, 10, 5, 0.2) for _ in range(8)], seconds=1.0) == []  # fmt: skip


def test_sides_must_have_had_the_same_work() -> None:
    a, b = good(), good()
    assert check_alike({"a": a, "b": b}) == []
    assert check_alike({"a": a, "b": replace(b, prompts="vllm:b")}) == [
        "a and b had different prompts"
    ]
    longer = [replace(r, output_len=6) for r in requests()]
    assert check_alike({"a": a, "b": replace(b, requests=longer)}) == [
        "a and b had different output lengths"
    ]
    other = [replace(r, input_len=11) for r in requests()]
    assert check_alike({"a": a, "c": b, "b": replace(b, requests=other)}) == [
        "a and b had different prompt lengths"
    ]
    # Each tool makes its own random prompts; their lengths are what can be compared.
    assert check_alike({"a": a, "b": replace(b, prompts="loop:b")}) == []
    # A tool that does not tell counts for nothing.
    assert check_alike({"a": a, "b": replace(b, prompts="", requests=())}) == []
