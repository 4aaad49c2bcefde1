"""What makes a run invalid: each check fails on the run that it is for, and passes a good one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gblm.bench.requests import Request
from gblm.bench.validity import Asked, Limits, Seen, check_alike, check_run

ASKED = Asked(num_prompts=8, input_len=10, output_len=5, concurrency=1)


def requests(count: int = 8, gap: float = 1.0, latency: float = 1.0) -> list[Request]:
    """One after the other, every `gap` seconds."""
    return [Request(gap * i, latency, 10, 5, 0.2, (0.2,) * 4) for i in range(count)]


def good() -> Seen:
    noise = {"steal": 0.0, "other_load": 0.01, "cpu_throttles": 0, "gpu_throttle_s": None}
    return Seen(requests(), 8.0, preemptions=0, cached=0.0, prompts="vllm:a", noise=noise)


def reasons(asked: Asked = ASKED, **changed: object) -> list[str]:
    return check_run(asked, replace(good(), **changed), Limits())


def test_a_good_run_has_no_reasons() -> None:
    assert reasons() == []


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"failed": 1}, "8 of 8 requests succeeded"),
        ({"requests": requests(7)}, "7 of 8 requests succeeded"),
        ({"requests": (), "completed": 7}, "7 of 8 requests succeeded"),
        (
            {"requests": [replace(r, output_len=4) for r in requests()]},
            "8 of 8 answers have another length than the 5 tokens asked for, such as 4",
        ),
        ({"seconds": 20.0}, "1 requests in flight were asked for, on average there were 0.40"),
        ({"preemptions": 3.0}, "3 preemptions"),
        ({"cached": 0.5}, "50% of the prompt tokens came from the prefix cache"),
        ({"noise": {"steal": 0.05}}, "5.0% of the CPU time was stolen"),
        ({"noise": {"other_load": 0.25}}, "25.0% of the CPU time went to other processes"),
        ({"noise": {"cpu_throttles": 4}}, "heat throttled the CPU 4 times"),
        ({"noise": {"gpu_throttle_s": 0.25}}, "a GPU ran slower for heat for 0.25 s"),
    ],
)
def test_each_flaw_is_named(changed: dict[str, object], sentence: str) -> None:
    found = reasons(**changed)
    assert len(found) == 1, found
    assert sentence in found[0]


def test_limits_of_noise_can_be_raised() -> None:
    noisy = replace(good(), noise={"steal": 0.05, "other_load": 0.25})
    assert len(check_run(ASKED, noisy, Limits())) == 2
    assert check_run(ASKED, noisy, Limits(0.1, 0.3)) == []


def test_a_late_generator_and_a_server_that_falls_behind_are_told_apart() -> None:
    asked = replace(ASKED, request_rate=1.0, concurrency=None)
    assert reasons(asked, seconds=8.0) == []
    late = reasons(asked, requests=requests(gap=2.0), seconds=15.0)
    assert late == ["1 requests/s were asked for, 0.50 were sent"]
    behind = [Request(1.0 * i, 1.0 + 1.5 * i, 10, 5, 0.2) for i in range(8)]
    (found,) = reasons(asked, requests=behind, seconds=18.5)
    assert "the server falls behind" in found


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
