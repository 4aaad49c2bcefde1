"""Gates: a closed grammar, one sentence per mistake, and verdicts that fail when they must."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import Outcome

from gblm.errors import InputError, UsageError
from gblm.evaluate.gates import check_gates, judge, parse_gate
from gblm.record import Record, Row

TASK = "arc_easy, lm-eval 0.4.13, 0-shot, all examples, seed 0"
FIGURES = {
    ("half", "a.txt, 8 windows"): {
        "perplexity": 11.0, "drift_mean": 0.1, "kl_mean": 0.05, "top1": 0.9,
    },
    ("dense", "a.txt, 8 windows"): {"perplexity": 10.0},
    ("half", "b.txt, 8 windows"): {"perplexity": 30.0, "kl_mean": 0.01, "top1": 0.95},
    ("dense", "b.txt, 8 windows"): {"perplexity": 20.0},
    ("half", TASK): {"acc": 0.60},
    ("dense", TASK): {"acc": 0.62},
}  # fmt: skip


def quality(figures: dict[tuple[str, str], dict[str, float]] = FIGURES) -> Record:
    rows = [Row(side, load, metric, "", value) for (side, load), found in figures.items()
            for metric, value in found.items()]  # fmt: skip
    return Record("eval", {"half": {}, "dense": {}}, tuple(rows), "dense")


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
        ("drift_mean <= 0.1", 0.1, "a.txt", True),
        ("top1 >= 0.95", 0.9, "a.txt", False),
        ("acc(arc_easy) >= -1pt", -2.0, "arc_easy", False),
        ("acc(arc_easy) >= -2.5pt", -2.0, "arc_easy", True),
        ("acc(arc_easy) >= 0.6", 0.6, "arc_easy", True),
    ],
)
def test_outcomes(gate: str, value: float, of: str, passed: bool) -> None:
    (outcome,) = judge([parse_gate(gate)], quality())
    assert outcome.value == pytest.approx(value)
    assert (outcome.of, outcome.passed) == (of, passed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_passes_by_being_no_number(value: float) -> None:
    broken = quality(FIGURES | {("half", "c.txt, 8 windows"): {"perplexity": value}})
    (outcome,) = judge([parse_gate("ppl <= 100")], broken)
    assert (outcome.passed, outcome.of) == (False, "c.txt")
    assert "gate failed: ppl <= 100: " in outcome.sentence()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_passes_beside_a_dense_model_that_is_broken(value: float) -> None:
    broken = quality(FIGURES | {("dense", "a.txt, 8 windows"): {"perplexity": value}})
    (outcome,) = judge([parse_gate("ppl(a.txt) <= 100x")], broken)
    assert not outcome.passed


def test_one_answer_of_a_hundred_is_one_point() -> None:
    for right in range(1, 101):
        scores = {("half", TASK): {"acc": (right - 1) / 100}, ("dense", TASK): {"acc": right / 100}}
        (outcome,) = judge([parse_gate("acc(arc_easy) >= -1pt")], quality(scores))
        assert outcome.passed, right


@pytest.mark.parametrize(
    ("gate", "figures"),
    [
        ("ppl <= 1.1x", {("half", "a.txt, x"): {"perplexity": 11.0}}),
        ("top1 >= 0.5", {("half", "a.txt, x"): {"perplexity": 11.0}}),
        ("kl <= 100", {("half", "a.txt, x"): {"drift_mean": 0.1}}),
        ("acc(boolq) >= 0.1", FIGURES),
    ],
)
def test_a_figure_that_is_not_there_is_an_error(gate: str, figures: dict) -> None:
    with pytest.raises(InputError, match="has no such figure"):
        judge([parse_gate(gate)], quality(figures))


@pytest.mark.parametrize(
    ("gate", "sentence"),
    [
        ("acc(boolq) >= 0.5", "not among --tasks"),
        ("ppl(c.txt) <= 2x", "measured are a.txt"),
    ],
)
def test_gates_on_what_is_not_measured_are_refused(gate: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        check_gates([parse_gate(gate)], ["a.txt"], ["arc_easy"])


def test_a_failed_gate_ends_with_5_and_names_itself(
    gblm: Callable[..., Outcome], tiny: Path, text_file: Path
) -> None:
    words = ("eval", tiny, "--text", text_file, "--seq-len", 32, "--max-windows", 1)
    gates = ("--gate", "ppl <= 1.5", "--gate", "ppl <= 1000000")
    done = gblm(*words, *gates, "--output", "record.json")
    assert done.code == 5, done
    assert re.search(r"gate failed: ppl <= 1\.5: \d+\.\d{4}, text\.txt\n", done.err)
    assert "gate failed: ppl <= 1.5: " in done.out
    assert "gate passed: ppl <= 1000000: " in done.out
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
    notes = Record.read(tmp_path / "quality.json").verdict.notes
    assert sum(note.startswith("gate ") for note in notes) == 2
