"""`gblm eval MODEL`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from gblm.commands.common import (
    Command,
    backend_option,
    device_option,
    dtype_option,
    emit,
    progress_bars,
    record_option,
    save_record,
    table,
)
from gblm.commands.eval_options import ENGINES, protocols, task_options, tasks_of, text_options

TASK_KEYS = ("tasks", "path", "limit", "seed")


@click.command("eval", cls=Command)
@click.argument("model")
@click.option("--baseline", help="Dense model to compare with. Default: what MODEL says it is of.")
@click.option("--no-baseline", "without_baseline", is_flag=True, help="Measure MODEL alone.")
@click.option(
    "--engine", type=click.Choice(ENGINES), help="What computes. Default: what MODEL is made for."
)
@text_options
@task_options
@click.option("--gate", "gates", multiple=True, help="A bound, such as 'ppl <= 1.10x'; repeatable.")
@click.option(
    "--record",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Record of `gblm bench` for gates on speed.",
)
@dtype_option
@device_option
@backend_option
@click.option("--tokenizer", help="Folder of it, for a server on another machine.")
@click.option(
    "--api-key-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File with the server's API key. Default: VLLM_API_KEY, if it is set.",
)
@record_option
@click.pass_context
def command(
    ctx: click.Context,
    /,
    gates: tuple[str, ...],
    record: Path | None,
    output: Path | None,
    **given: Any,
) -> None:
    """Measure MODEL's quality on texts and tasks, its dense baseline and the protocol beside it.

    MODEL is a dense, packed or exported folder, or the address of a running vLLM server. Exit
    status 5: a gate failed.
    """
    from gblm.evaluate.gates import check_gates, judge, parse_gate
    from gblm.folder import model_name, read_json_object

    parsed = [parse_gate(gate) for gate in gates]
    wanted = {key: given.pop(key) for key in TASK_KEYS}
    bench = read_json_object(record) if record else None
    with progress_bars(ctx) as progress:
        from gblm.evaluate.run import Evaluation, run_evaluation
        from gblm.evaluate.served import is_address

        tasks = tasks_of(**wanted)
        asked = Evaluation(
            protocols=protocols(tasks=tasks is not None, **_texts(given)), tasks=tasks,
            needs_baseline=any(gate.needs_baseline for gate in parsed), **given,
        )  # fmt: skip
        names = [Path(one.source).name for one in asked.protocols]
        # A server names its model only when it is asked.
        model = None if is_address(asked.model) else model_name(asked.model)
        check_gates(parsed, names, tasks.names if tasks else (), bench, model)
        result = run_evaluation(asked, progress)
    verdicts = judge(parsed, result, bench, model)
    result["gates"] = [one.to_dict() for one in verdicts]
    save_record(output, result)
    emit(ctx, result, lambda: _show(result))
    failed = [row for row in result["gates"] if not row["passed"]]
    for row in failed:
        click.echo(f"gblm: gate failed: {row['gate']}: {_value(row)}, {row['of']}", err=True)
    if failed:
        ctx.exit(5)


def _texts(given: dict[str, Any]) -> dict[str, Any]:
    keys = ("sources", "name", "seq_len", "stride", "max_windows", "dtype", "bos")
    return {key: given.pop(key) for key in keys}


def _show(result: dict[str, Any]) -> None:
    """A block per text, then tasks, then gates; the protocol under every figure."""
    for row in result["texts"]:
        rows = [[result["model"], f"{row['perplexity']:.2f}"]]
        if result["baseline"]:
            rows.append([result["baseline"], f"{row['perplexity_baseline']:.2f}"])
            rows.append(["ratio", f"{row['ratio']:.3f}"])
        table([row["text"], "perplexity"], rows)
        if drift := row.get("drift"):
            # Over some tokens it is a lower bound.
            sign = "at least " if "kl_over" in drift else ""
            kl = "" if drift["kl_mean"] is None else f", KL {sign}{drift['kl_mean']:.4f} nats"
            click.echo(
                f"drift of log-probs: mean {drift['mean']:.4f}, p99 {drift['p99']:.4f}, max "
                f"{drift['max']:.4f} nats{kl}; same top-1 {drift['top1']:.1%}"
            )
        click.echo(f"protocol: {row['protocol']}")
        if row.get("protocol_baseline", row["protocol"]) != row["protocol"]:
            click.echo(f"protocol of the baseline: {row['protocol_baseline']}")
    if tasks := result["tasks"]:
        cells = [
            [task, metric, _share(row["value"], row["stderr"]),
             _share(row.get("baseline"), row.get("baseline_stderr"))]
            for task, metrics in tasks["results"].items()
            for metric, row in metrics.items()
        ]  # fmt: skip
        table(["task", "metric", "model", "baseline"], cells)
        click.echo(f"protocol: {tasks['protocol']}")
    note = result["baseline_note"]
    click.echo(f"baseline: {result['baseline'] or 'none'} ({note})")
    if result["gates"]:
        table(["gate", "decided by", "value", ""], [_verdict(row) for row in result["gates"]])


def _share(value: float | None, error: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")


def _verdict(row: dict[str, Any]) -> list[str]:
    return [row["gate"], row["of"], _value(row), "pass" if row["passed"] else "FAIL"]


def _value(row: dict[str, Any]) -> str:
    return "nan" if row["value"] is None else f"{row['value']:.4f}{row['unit']}"
