"""Records in benchmarks/results say where they come from: machine, versions, commit, command."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matrix_tables import TOLERANCES, apart
from pages import made_by

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
RECORDS = sorted(RESULTS.glob("*.json"))
# Made before records held their command; a new recording takes its file off this list.
WITHOUT_COMMAND = {
    "budget", "compilers", "expand", "frontier",
    "load-memory", "memory", "modes", "onnx", "onnx-sizes",
    "onnx-zen4", "pruning-speed", "published-code", "published-rounding", "quality-gblm-0.5",
    "quality-gblm-2of4", "quality-gblm-reference-2of4", "quality-gradient-0.5",
    "quality-gradient-2of4", "quality-magnitude-0.5", "quality-magnitude-2of4",
    "quality-sparsegpt-0.5", "quality-sparsegpt-2of4", "quality-sparsegpt-sequential-0.5",
    "quality-sparsegpt-sequential-2of4", "quality-wanda-0.5", "quality-wanda-2of4",
    "quality-wanda-sequential-0.5", "quality-wanda-sequential-2of4",
    "rivals", "serving-gblm-2of4-cpu", "serving-gblm-2of4-dense", "soak",
}  # fmt: skip


def found(record: Any, *keys: str) -> Iterator[Any]:
    """What stands under one of the keys, anywhere in a record."""
    if isinstance(record, dict):
        yield from (record[key] for key in keys if key in record)
    inner = record.values() if isinstance(record, dict) else record
    if isinstance(record, dict | list):
        for value in inner:
            yield from found(value, *keys)


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_where_it_comes_from(path: Path) -> None:
    record = json.loads(path.read_text())
    assert isinstance(record["kind"], str)
    origins = list(found(record, "provenance"))
    assert origins
    for origin in origins:
        assert re.match(r"[0-9a-f]{40}(-dirty)?$", origin["commit"])
        assert origin["packages"]
        assert origin["machine"]["cpu"]
    commands = list(found(record, "command", "commands"))
    assert bool(commands) == (path.stem not in WITHOUT_COMMAND)


def test_the_list_of_those_without_a_command_names_no_other_file() -> None:
    assert {path.stem for path in RECORDS} >= WITHOUT_COMMAND


def test_engines_agree_on_the_real_model_within_what_the_page_says() -> None:
    differences = apart(json.loads((RESULTS / "evaluation.json").read_text()))
    assert {engine for engine, _ in differences} == {"onnx", "vllm"}
    for (_, dtype), value in differences.items():
        assert value <= TOLERANCES[dtype]


@pytest.mark.parametrize("page", ["README.md", "docs/kernels.md"])
def test_ratios_of_a_decoding_table_are_those_of_its_speeds(page: str) -> None:
    text = (RESULTS.parent.parent / page).read_text()
    tables = re.findall(r"^\| [^|]*threads: \d.*?\n\n", text, re.MULTILINE | re.DOTALL)
    assert tables
    for table in tables:
        head, _, *rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
        speeds = {row[0]: [re.findall(r"[\d.]+", cell) for cell in row[2:]] for row in rows}
        for column, title in enumerate(head[2:]):
            bases = [re.search(r"\(× (.*), × (.*)\)", title)[i] for i in (1, 2)]  # type: ignore[index]
            bases[0] = "dense bf16 (vLLM)" if bases[0] == "vLLM bf16" else bases[0]
            for cells in speeds.values():
                speed, *ratios = map(float, cells[column] or ["0"])
                for ratio, name in zip(ratios, bases, strict=False):
                    base = float(speeds[name][column][0])
                    rounding = 0.0051 + ratio * (0.05 / base + 0.05 / speed)
                    assert ratio == pytest.approx(speed / base, abs=rounding)


def test_a_script_says_how_it_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/home/me/gblm/benchmarks/rivals.py", "--model", "/home/me/smol", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", words)
    assert made_by() == "python benchmarks/rivals.py --model smol --rounds 3"
