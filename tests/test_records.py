"""Records in benchmarks/results say where they come from: machine, versions, commit, command."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pages
import pytest
import summary
from decoding import control_of
from pages import made_by

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
RECORDS = sorted(RESULTS.glob("*.json"))


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
    assert any(found(record, "command", "commands"))


def git(*words: str) -> subprocess.CompletedProcess[str]:
    root = RESULTS.parent.parent
    return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=False)


@functools.cache
def code(commit: str, name: str) -> str:
    """A file as of a commit; of Python only what runs."""
    text = git("show", f"{commit}:{name}").stdout
    return running(text) if name.endswith(".py") else text


def running(text: str) -> str:
    """A module without its comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            node.body.pop(0)
    return ast.dump(tree)


def test_comments_and_docstrings_do_not_make_a_record_stale() -> None:
    text = 'def f():\n    """Say it."""\n    return 1  # why\n'
    assert running(text) == running(text.replace("Say it", "Tell it").replace("why", "since"))
    assert running(text) != running(text.replace("1", "2"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_is_of_the_code_it_measures(path: Path) -> None:
    record = json.loads(path.read_text())
    measures = pages.MEASURES[record["kind"]]
    stale = []
    for commit in {*found(record, "commit")} - {None}:
        clean = commit.partition("-")[0]
        if git("cat-file", "-e", clean).returncode:
            pytest.skip(f"a clone without history: {clean} is not there")
        names = git("diff", "--name-only", clean, "HEAD", "--", *measures).stdout.split()
        stale += [name for name in names if code(clean, name) != code("HEAD", name)]
        stale += [commit] * commit.endswith("-dirty")
    assert not stale
    assert record["provenance"]["measures"] == list(measures)


Speeds = dict[str, list[list[float]]]


def tables_of_speeds(page: str, title: str) -> Iterator[tuple[list[str], Speeds, int]]:
    """Every table whose head has a title: its columns of speeds, the numbers of each row in them,
    and the place of the row of bf16, whose speeds stand alone."""
    text = (RESULTS.parent.parent / page).read_text()
    for table in re.findall(rf"^\| {title}.*?\n\n", text, re.MULTILINE | re.DOTALL):
        head, _, *rows = [line.strip("| ").split(" | ") for line in table.strip().splitlines()]
        first = next(n for n, column in enumerate(head) if "tok/s" in column)
        numbers = {
            row[0]: [[float(n) for n in re.findall(r"[\d.]+", cell)] for cell in row[first:]]
            for row in rows
        }
        yield head[first:], numbers, first


def assert_divides(speed: float, ratio: float, base: float) -> None:
    """A printed ratio is that of two printed speeds, but for the digits that are not printed."""
    rounding = 0.0051 + ratio * (0.05 / base + 0.05 / speed)
    assert ratio == pytest.approx(speed / base, abs=rounding)


def assert_ratios(columns: list[str], speeds: Speeds) -> int:
    """Ratios are to bf16 and to the dense row of the value type; gives how many there were."""
    divided = 0
    for number in range(len(columns)):
        for name, row in speeds.items():
            if not row[number][1:]:
                continue  # bf16 itself, or not measured
            dense = next(n for n in speeds if n.startswith(control_of(name).rstrip(",")))
            names = [n for n in ("dense bf16 (vLLM)", dense) if n in speeds]
            bases = [speeds[base][number][0] for base in names]
            for ratio, base in zip(row[number][1:], bases, strict=True):
                assert_divides(row[number][0], ratio, base)
                divided += 1
    return divided


def test_ratios_of_a_decoding_table_are_those_of_its_speeds() -> None:
    tables = list(tables_of_speeds("docs/results.md", r"[^|]*\d thread"))
    assert len(tables) == len(list(RESULTS.glob("decoding-*.json")))
    for columns, speeds, _ in tables:
        assert assert_ratios(columns, speeds) >= 8


def test_ratios_of_the_readmes_table_are_those_of_its_speeds() -> None:
    ((columns, speeds, _),) = tables_of_speeds("README.md", "model")
    names = [name.split(": ", 1) for name in speeds]
    assert {model for model, _ in names} == {pages.MODELS[model] for model in summary.MODELS}
    for model in {model for model, _ in names}:
        own = {label: speeds[f"{model}: {label}"] for of, label in names if of == model}
        measured = [number for number in range(len(columns)) if own["dense bf16 (vLLM)"][number]]
        assert measured
        assert assert_ratios(columns, own) == 2 * len(measured) * (len(own) - 1)


def test_ratios_of_the_readmes_larger_shapes_are_those_of_their_speeds() -> None:
    text = (RESULTS.parent.parent / "README.md").read_text()
    rows = re.findall(r"^\| .* shape \| .* \|$", text, re.MULTILINE)
    assert rows
    for row in rows:
        *others, dense, own, by_rival, by_dense = map(float, re.findall(r"\d+\.\d+(?= \|)", row))
        assert_divides(own, by_rival, max(others))
        assert_divides(own, by_dense, dense)


def test_a_script_says_how_it_was_called(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["/home/me/gblm/benchmarks/rivals.py", "--model", "/home/me/smol", "--rounds", "3"]
    monkeypatch.setattr(sys, "argv", words)
    assert made_by() == "python benchmarks/rivals.py --model smol --rounds 3"
