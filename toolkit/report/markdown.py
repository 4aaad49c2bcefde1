"""Tables for READMEs, and the model-index of a model card, from the same facts as the page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from gblm.report.axes import number
from gblm.report.facts import Facts
from gblm.report.page import repeat
from gblm.report.sources import Sources
from gblm.report.tables import measured, tables


def markdown(sources: Sources, title: str) -> str:
    """A page of tables; with perplexities or tasks it begins with their model-index.

    Args:
        sources: what it shows.
        title: of the page.
    """
    facts = sources.facts
    lines = [*model_index(facts), f"# {escape(title)}", ""]
    if facts.invalid:
        lines += ["**INVALID measurements, left out of every table:**", ""]
        lines += [*(f"- {escape(reason)}" for reason in facts.invalid), ""]
    if facts.notes:
        lines += ["To be kept in mind:", "", *(f"- {escape(note)}" for note in facts.notes), ""]
    for one in (*tables(facts), *measured(facts)):
        lines += [f"## {one.title}", ""]
        lines += [f"Protocol: {escape(one.note)}.", ""] if one.note else []
        lines += [*table(one.header, one.rows), ""]
    lines += _speeds(facts)
    for folder in sources.folders:
        size, dense = folder.facts["bytes"] / 1e6, folder.facts["bytes_if_dense"] / 1e6
        lines += [f"## {escape(folder.name)}", ""]
        lines += [f"{len(folder.linears)} packed linears, {size:.1f} MB ({dense:.1f} MB dense)."]
        lines += [""]
    lines += _repeat(sources)
    return "\n".join(lines).rstrip() + "\n"


def model_index(facts: Facts) -> list[str]:
    """The front matter that model hubs read: finite perplexities and tasks, with protocols."""
    finite = [row for row in facts.quality if row.perplexity < float("inf")]
    names = dict.fromkeys([*(row.name for row in finite), *(one.name for one in facts.scores)])
    if not names:
        return []
    lines = ["---", "model-index:"]
    for name in names:
        # JSON's strings are YAML's, too.
        lines += [f"- name: {json.dumps(name)}", "  results:"]
        for row in finite:
            if row.name == name:
                lines += _result(row.protocol.partition(",")[0], "perplexity", row.perplexity,
                                 f"perplexity ({row.protocol})")  # fmt: skip
        for score in facts.scores:
            if score.name == name:
                said = f"{score.metric} ({score.protocol})"
                lines += _result(score.task, score.metric, score.value, said)
    return [*lines, "---", ""]


def _result(dataset: str, metric: str, value: float, name: str) -> list[str]:
    return [
        "  - task: {type: text-generation}",
        f"    dataset: {{name: {json.dumps(dataset)}, type: {json.dumps(dataset)}}}",
        "    metrics:",
        f"    - {{type: {json.dumps(metric)}, value: {value:.4f}, name: {json.dumps(name)}}}",
    ]


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table, numbers to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    lines = [[escape(cell) for cell in row] for row in (header, *rows)]
    lines.insert(1, rule)
    return [f"| {' | '.join(cells)} |" for cells in lines]


def escape(text: str) -> str:
    """Text that stays text: no markup, no HTML, no new cell."""
    for sign in "\\`*_[]<>|":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def _speeds(facts: Facts) -> Iterator[str]:
    for setting in dict.fromkeys(speed.setting for speed in facts.speeds):
        rows = [(s.name, *map(number, (s.median, s.low, s.high)))
                for s in facts.speeds if s.setting == setting]  # fmt: skip
        yield from ("## Milliseconds per token", "", f"{escape(setting)}.", "")
        yield from table(("model", "median", "min", "max"), rows)
        yield ""
    for setting in dict.fromkeys(ratio.setting for ratio in facts.ratios):
        ratios = [(r.name, r.metric, *map(number, (r.median, r.low, r.high)))
                  for r in facts.ratios if r.setting == setting]  # fmt: skip
        yield from ("## Ratios", "", f"{escape(setting)}.", "")
        yield from table(("model", "metric", "ratio", "low", "high"), ratios)
        yield ""


def _repeat(sources: Sources) -> Iterator[str]:
    found = repeat(sources)
    yield from ("## How to repeat it", "")
    # A fence that no recorded command can close.
    yield from (f"    {' '.join(command.split())}" for command in found["commands"])
    yield ""
    for name in found["unrecorded"]:
        yield f"- {escape(name)}: the record does not say by which command it was made."
    for environment in found["environments"]:
        yield "- " + "; ".join(f"{key}: {escape(value)}" for key, value in environment.items())
