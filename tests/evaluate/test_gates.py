"""Gates: a closed grammar, one sentence per mistake, and verdicts that fail when they must."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import Outcome
from record_cases import models_record

from gblm.errors import InputError, UsageError
from gblm.evaluate.gates import check_gates, judge, parse_gate

TEXT = {"text": "a.txt", "perplexity": 11.0, "ratio": 1.1,
        "drift": {"mean": 0.1, "p99": 0.5, "max": 2.0, "kl_mean": 0.05, "top1": 0.9}}  # fmt: skip
WORSE = TEXT | {"text": "b.txt", "perplexity": 30.0, "ratio": 1.5}
RESULT = {
    "texts": [TEXT, WORSE],
    "tasks": {"results": {"arc_easy": {"acc": {"value": 0.60, "baseline": 0.62}}}},
}
SERVING = {"kind": "bench serving", "model": "half",
           "summary": {"decode_tok_s": {"ratio": 1.6}}}  # fmt: skip
ONNX = {
    "kind": "onnx",
    "rows": [{"name": "dense"}, {"name": "half", "decode_speedup": {"dense": {"median": 1.4}}}],
}


@pytest.mark.parametrize(
    ("gate", "sentence"),
    [
        ("ppl", "write VALUE <= NUMBER"),
        ("ppl <= 1.1x and top1 >= 0.9", "write VALUE <= NUMBER"),
        ("ppl <= nan", "write VALUE <= NUMBER"),
        ("__import__('os') <= 1", "__import__ is unknown; choose from ppl"),
        ("bleu >= 1", "bleu is unknown; choose from ppl"),
        ("ppl >= 1.1x", "ppl takes <=, not >="),
        ("top1 <= 0.9", "top1 takes >=, not <="),
        ("ppl == 3", "ppl takes <=, not =="),
        ("ppl <= 3pt", "the unit 'pt' does not fit"),
        ("decode >= 30", "write a bound as 1x"),
        ("acc >= 0.5", "name the task"),
        ("ppl <= 0x", "must be above 0"),
    ],
)
def test_bad_gates_get_one_sentence(gate: str, sentence: str) -> None:
    with pytest.raises(UsageError, match="gate") as caught:
        parse_gate(gate)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("gate", "value", "of", "passed"),
    [
        ("ppl(a.txt) <= 1.10x", 1.1, "a.txt", True),
        ("ppl <= 1.10x", 1.5, "b.txt", False),
        ("ppl<=30", 30.0, "b.txt", True),
        ("kl <= 0.04", 0.05, "a.txt", False),
        ("drift_p99 <= 0.5", 0.5, "a.txt", True),
        ("top1 >= 0.95", 0.9, "a.txt", False),
        ("acc(arc_easy) >= -1pt", -2.0, "arc_easy", False),
        ("acc(arc_easy) >= -2.5pt", -2.0, "arc_easy", True),
        ("acc(arc_easy) >= 0.6", 0.6, "arc_easy", True),
        ("decode >= 1.5x", 1.6, "decode_tok_s", True),
    ],
)
def test_verdicts(gate: str, value: float, of: str, passed: bool) -> None:
    (verdict,) = judge([parse_gate(gate)], RESULT, SERVING)
    assert verdict.value == pytest.approx(value)
    assert (verdict.of, verdict.passed) == (of, passed)


def test_nothing_passes_by_being_no_number() -> None:
    broken = {"texts": [TEXT, TEXT | {"text": "c.txt", "perplexity": float("nan")}], "tasks": None}
    (verdict,) = judge([parse_gate("ppl <= 100")], broken)
    assert not verdict.passed
    assert verdict.of == "c.txt"
    assert verdict.to_dict()["value"] is None


def test_decode_reads_records_of_onnx() -> None:
    (verdict,) = judge([parse_gate("decode(half) >= 1.5x")], RESULT, ONNX)
    assert (verdict.value, verdict.passed) == (1.4, False)
    with pytest.raises(InputError, match="name one row"):
        judge([parse_gate("decode(other) >= 1x")], RESULT, ONNX)
    with pytest.raises(InputError, match="kind is 'budget'"):
        judge([parse_gate("decode >= 1x")], RESULT, {"kind": "budget"})


def models(**changed: object) -> dict[str, Any]:
    """Half as long per token at concurrency 1, 0.8 of the time at 4."""
    record = models_record({"dense": 20.0, "half": 10.0}, concurrency=(1, 4))
    record["rows"][3]["ratio"]["tpot_ms_p50"]["median"] = 0.8
    record["rows"][1]["ratio"]["tpot_ms_p50"]["median"] = 0.5
    record["sides"] = [{"name": name, "model": f"{name}-folder"} for name in ("dense", "half")]
    return record | changed


def test_of_several_loads_the_slowest_decides() -> None:
    for gate, model in (("decode(half) >= 1.5x", "x"), ("decode >= 1.5x", "half-folder")):
        (verdict,) = judge([parse_gate(gate)], RESULT, models(), model)
        assert (verdict.value, verdict.of) == (1.25, "half, concurrency 4")
        assert not verdict.passed


HOLLOW = {"kind": "bench serving", "model": "half"}
INVALID = models_record({"dense": 20.0, "half": 10.0}, invalid={"half": "7 preemptions"})


@pytest.mark.parametrize(
    ("gate", "record", "sentence"),
    [
        ("decode >= 1x", SERVING, "the record measured 'half', not 'mine'"),
        ("decode(other) >= 1x", SERVING, "the record measured 'half', not 'other'"),
        ("decode >= 1x", models(), r"name one row, as in decode\(NAME\): half"),
        ("decode(dense) >= 1x", models(), "name one row"),
        ("decode(half) >= 1x", INVALID | {"sides": models()["sides"]}, "INVALID, so no figure"),
        ("decode(half) >= 1x", models(rows=[]), "INVALID, so no figure"),
        ("decode(half) >= 1x", HOLLOW, "'summary' is missing"),
        ("decode(half) >= 1x", {"kind": "bench models"}, "'baseline' is missing"),
        ("decode >= 1x", {"kind": "onnx", "rows": []}, "none of kind 'onnx' as gblm writes it"),
        (
            "decode(half) >= 1x",
            SERVING | {"summary": {"decode_tok_s": {"ratio": 10**400}}},
            "int too",
        ),
        (
            "decode(half) >= 1x",
            SERVING | {"summary": {"decode_tok_s": {"ratio": float("inf")}}},
            "decode_tok_s is inf",
        ),
        ("decode >= 1x", {"kind": ["x"]}, "the record's kind is"),
    ],
)
def test_a_record_that_does_not_hold_the_figure_is_refused_before_anything_is_measured(
    gate: str, record: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InputError, match=f"^gate '.*{sentence}"):
        check_gates([parse_gate(gate)], ["a.txt"], (), record, "mine")


def test_a_missing_figure_is_no_pass() -> None:
    alone = {"texts": [{"text": "a.txt", "perplexity": 11.0}], "tasks": None}
    for gate in ("ppl <= 1.1x", "top1 >= 0.5", "kl <= 1"):
        with pytest.raises(InputError, match="needs a dense --baseline"):
            judge([parse_gate(gate)], alone)


@pytest.mark.parametrize(
    ("gate", "sentence"),
    [
        ("acc(boolq) >= 0.5", "not among --tasks"),
        ("ppl(c.txt) <= 2x", "measured are a.txt"),
        ("decode >= 1x", "give --record"),
    ],
)
def test_gates_on_what_is_not_measured_are_refused(gate: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        check_gates([parse_gate(gate)], ["a.txt"], ["arc_easy"], None)


def test_a_bad_gate_is_refused_before_a_model_is_looked_for(gblm: Callable[..., Outcome]) -> None:
    done = gblm("eval", "./nowhere", "--gate", "ppl >= 2")
    assert done.code == 2, done
    assert "ppl takes <=" in done.err


def test_a_failed_gate_ends_with_5_and_names_itself(
    gblm: Callable[..., Outcome], tiny: Path, text_file: Path
) -> None:
    words = ("eval", tiny, "--text", text_file, "--seq-len", 32, "--max-windows", 1)
    gates = ("--gate", "ppl <= 1.5", "--gate", "ppl <= 1000000")
    done = gblm(*words, *gates, "--output", "record.json")
    assert done.code == 5, done
    assert re.search(r"gate failed: ppl <= 1\.5: \d+\.\d{4}, text\.txt\n", done.err)
    assert "FAIL" in done.out
    assert "pass" in done.out
    assert gblm(*words, "--gate", "ppl <= 1000000").code == 0


def test_the_workflow_for_github_runs_and_stops_a_model_that_is_not_good_enough(
    gblm: Callable[..., Outcome], tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    """A model with random weights and a short text stand in for the real ones."""
    (tmp_path / "smollm2").symlink_to(tiny)
    file = Path(__file__).resolve().parents[2] / "deploy" / "github" / "quality-gate.yml"
    steps = yaml.safe_load(file.read_text())["jobs"]["gate"]["steps"]
    lines = [shlex.split(step["run"]) for step in steps if step.get("run", "").startswith("gblm")]
    assert [line[1] for line in lines] == ["fetch", "prune", "eval"]
    assert gblm("fetch", "--help").code == 0
    made = gblm(*lines[1][1:], "--calibration", text_file)
    assert made.code == 0, made
    judged = gblm(*(text_file if word == "pydoc" else word for word in lines[2][1:]))
    assert judged.code == 5, judged
    assert "gate failed: top1 >= 0.5: 0." in judged.err
    assert len(json.loads((tmp_path / "quality.json").read_text())["gates"]) == 2
