"""`gblm bench models`: any number of models in turn, round after round; ratios paired by round.

Here: who runs when, what may stand, the statistics, the record. The load comes from vLLM's own
tools, or from one loop for all engines without a server.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gblm.bench import guidellm, loop
from gblm.bench.paired import bootstrap_median, spread
from gblm.bench.requests import Slo, metrics_of
from gblm.bench.sides import LOOPS, Side
from gblm.bench.tools import WITH_SERVER, Context, tool_of
from gblm.bench.validity import Asked, Limits, Seen, check_alike, check_run
from gblm.errors import UsageError
from gblm.progress import Progress, no_progress
from gblm.provenance import provenance

Run = dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is measured, and how.

    Attributes:
        loads: each is put on every side in every round.
        rounds: each starts every side anew, in another order.
        seed: of the prompts; all sides get the same ones.
        tool: for sides in vLLM: serve, guidellm, latency or throughput.
        slo: limits for goodput; none if None.
        limits: how much noise a run may have.
        threads: of engines without a server; their own choice if None.
        backend: for packed weights; the best one if None.
        options: for vLLM.
    """

    loads: tuple[Asked, ...]
    rounds: int = 3
    seed: int = 0
    tool: str = "serve"
    slo: Slo | None = None
    limits: Limits = field(default_factory=Limits)
    threads: int | None = None
    backend: str | None = None
    options: tuple[str, ...] = ()

    def check(self, sides: Sequence[Side]) -> None:
        """Refuse what cannot be measured, before anything is started.

        Raises:
            UsageError: a side cannot have such a load, or the tool does not exist.
            MachineError: GuideLLM is asked for and not there.
        """
        tool_of(self.tool)
        for side in sides:
            if side.engine not in LOOPS:
                continue
            for load in self.loads:
                if load.concurrency != 1 or load.request_rate is not None:
                    raise UsageError(
                        f"side {side.name!r}: {side.engine} runs one request at a time; give "
                        "--concurrency 1 and no --request-rate, or serve the model in vLLM."
                    )
        if self.tool == "guidellm":
            guidellm.program()
        if self.tool not in WITH_SERVER and any(
            load.request_rate is not None for load in self.loads
        ):
            raise UsageError(f"--with {self.tool} has no --request-rate: it has no server.")


def bench_models(
    sides: Sequence[Side],
    plan: Plan,
    progress: Progress = no_progress,
    log: Path | None = None,
) -> dict[str, Any]:
    """Measure all sides in turn; the first one is the baseline of all ratios.

    Args:
        sides: two or more.
        plan: what is measured.
        progress: for a progress bar.
        log: file for the servers' output; if None, a temporary one that is kept on failure.

    Returns:
        The record; its figures stand only where "valid" is true.

    Raises:
        UsageError: see `Plan.check`.
        MachineError: an engine or a tool failed.
    """
    plan.check(sides)
    step = progress("runs", plan.rounds * len(sides))
    runs: list[Run] = []
    with tempfile.TemporaryDirectory() as work:
        output = log or Path(tempfile.mkstemp(prefix="gblm-servers-", suffix=".log")[1])
        output.parent.mkdir(parents=True, exist_ok=True)
        context = Context(Path(work), output, plan.options, plan.backend, plan.seed)
        for number in range(plan.rounds):
            found: dict[str, list[Seen]] = {}
            for side in order(sides, number):
                found[side.name] = _measure(side, plan, context)
                step()
            runs += round_runs(number, found, plan)
    if log is None:
        output.unlink()
    return record_of(sides, plan, runs)


def order(sides: Sequence[Side], number: int) -> list[Side]:
    """The sides in the order of a round: turned and reversed, so that drift hits all alike."""
    shift = number // 2 % len(sides)
    turned = [*sides[shift:], *sides[:shift]]
    return turned[::-1] if number % 2 else turned


def _measure(side: Side, plan: Plan, context: Context) -> list[Seen]:
    if side.engine in LOOPS:
        return loop.measure(side, plan.loads, plan.seed, plan.threads, plan.backend)
    return tool_of(plan.tool)(side, plan.loads, context)


def round_runs(number: int, found: dict[str, list[Seen]], plan: Plan) -> list[Run]:
    """The runs of one round: metrics, evidence, and the reasons that speak against them."""
    runs = []
    for index, asked in enumerate(plan.loads):
        alike = check_alike({side: seen[index] for side, seen in found.items()})
        for side, every in found.items():
            seen = every[index]
            known = metrics_of(seen.requests, seen.seconds, plan.slo) if seen.requests else {}
            reasons = [*check_run(asked, seen, plan.limits), *alike]
            runs.append(
                {
                    "round": number,
                    "side": side,
                    "load": index,
                    "valid": not reasons,
                    "reasons": reasons,
                    "metrics": known | dict(seen.extra) | _energy(seen),
                    "evidence": {
                        "completed": len(seen.requests) or seen.completed,
                        "failed": seen.failed,
                        "seconds": seen.seconds,
                        "input_tokens": sum(r.input_len for r in seen.requests),
                        "prompts": seen.prompts,
                        "preemptions": seen.preemptions,
                        "cached": seen.cached,
                        **seen.noise,
                    },
                }
            )
    return runs


def _energy(seen: Seen) -> dict[str, float]:
    """Joules for each generated token; load and warm-up count, as the machine cannot tell."""
    joules, tokens = seen.noise.get("joules"), sum(r.output_len for r in seen.requests)
    return {} if joules is None or not tokens else {"joules_per_token": joules / tokens}


def record_of(sides: Sequence[Side], plan: Plan, runs: Sequence[Run]) -> dict[str, Any]:
    """Everything as plain JSON types."""
    first = plan.loads[0]
    rows = [
        row_of(side.name, sides[0].name, index, plan, runs)
        for index in range(len(plan.loads))
        for side in sides
    ]
    reasons = [
        f"{run['side']}, {load_name(plan.loads[run['load']])}, round {run['round'] + 1}: {reason}"
        for run in runs
        for reason in run["reasons"]
    ]
    return {
        "kind": "bench models",
        "valid": not reasons,
        "reasons": reasons,
        "caveats": [*caveats(sides, plan), *unchecked(sides, plan, runs)],
        "provenance": provenance(),
        "settings": {
            "num_prompts": first.num_prompts,
            "input_len": first.input_len,
            "output_len": first.output_len,
            "rounds": plan.rounds,
            "seed": plan.seed,
            "tool": plan.tool,
            "slo": None if plan.slo is None else asdict(plan.slo),
            "limits": asdict(plan.limits),
            "threads": plan.threads,
            "backend": plan.backend,
            "options": list(plan.options),
        },
        "baseline": sides[0].name,
        "sides": [
            {"name": side.name, "engine": side.engine, "model": side.path.name,
             "bytes": side.num_bytes}
            for side in sides
        ],
        "loads": [_load(load) for load in plan.loads],
        "rows": rows,
        "runs": list(runs),
    }  # fmt: skip


def row_of(side: str, baseline: str, load: int, plan: Plan, runs: Sequence[Run]) -> dict[str, Any]:
    """Medians of one side under one load, and ratios to the baseline where both are valid."""
    own, base = (
        [run for run in runs if run["side"] == name and run["load"] == load]
        for name in (side, baseline)
    )
    metrics = {
        name: spread([run["metrics"][name] for run in own])
        for name in own[0]["metrics"]
        if all(name in run["metrics"] for run in own)
    }
    row = {
        "load": _load(plan.loads[load]),
        "side": side,
        "valid": all(run["valid"] for run in own),
        "metrics": metrics,
    }
    if side != baseline and all(run["valid"] for run in [*own, *base]):
        row["ratio"] = {name: ratio for name in metrics if (ratio := ratio_of(name, own, base))}
    return row


def ratio_of(metric: str, own: Sequence[Run], base: Sequence[Run]) -> dict[str, float] | None:
    """Median of the ratios of the same rounds with its interval; None where one has no figure."""
    theirs = {run["round"]: run["metrics"].get(metric) for run in base}
    pairs = [(run["metrics"][metric], theirs.get(run["round"])) for run in own]
    ratios = [ours / other for ours, other in pairs if other]
    return bootstrap_median(ratios) if len(ratios) == len(pairs) else None


def caveats(sides: Sequence[Side], plan: Plan) -> list[str]:
    """What makes the figures less than they look, though they stand."""
    found = []
    engines = {side.engine for side in sides}
    if "vllm" in engines and len(engines) > 1:
        found.append(
            "vLLM is measured through its own tool, and its server if there is one; the other "
            "engines by a loop in their process, with other random prompts of about the same "
            "lengths: ratios between them hold HTTP and scheduling, too."
        )
    if plan.loads[0].num_prompts < 100:
        found.append(
            f"p99 of {plan.loads[0].num_prompts} requests is all but their slowest; raise "
            "--num-prompts to 100 or more to read it."
        )
    limits, usual = plan.limits, Limits()
    if limits.steal > usual.steal or limits.other_load > usual.other_load:
        found.append(
            f"limits of noise were raised: steal up to {limits.steal:.0%}, other load up to "
            f"{limits.other_load:.0%} of the CPU time."
        )
    if plan.rounds < 6:
        found.append(
            f"the interval of {plan.rounds} rounds is all but their range; raise --repeat to 6 or "
            "more."
        )
    return found


def unchecked(sides: Sequence[Side], plan: Plan, runs: Sequence[Run]) -> list[str]:
    """Which checks had nothing to look at."""
    found = []
    if plan.tool not in WITH_SERVER and any(side.engine == "vllm" for side in sides):
        found.append(
            f"--with {plan.tool} has no server that counts preemptions and cache hits: they were "
            "not checked."
        )
    keys = ("cpu_throttles", "gpu_throttle_s")
    if not any(run["evidence"].get(key) is not None for run in runs for key in keys):
        found.append("thermal throttling was not checked: neither kernel nor driver counts it.")
    return found


def load_name(load: Asked) -> str:
    """A load in words."""
    width = "no limit" if load.concurrency is None else str(load.concurrency)
    rate = "" if load.request_rate is None else f", {load.request_rate:g} requests/s"
    return f"concurrency {width}{rate}"


def _load(load: Asked) -> dict[str, Any]:
    return {"concurrency": load.concurrency, "request_rate": load.request_rate}
