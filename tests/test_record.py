"""The one record: what is written is read back, ratios pair up by round, damage is one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gblm.errors import InputError
from gblm.provenance import provenance
from gblm.record import Record, Row, Verdict, command_line, median_interval

LOAD = "64 + 32 tokens"


def example() -> Record:
    return Record(
        kind="bench",
        sides={"dense": {"bytes": 100}, "packed": {"bytes": 50, "recipe": {"pattern": "2:4"}}},
        rows=(
            Row.of_rounds("dense", LOAD, "tpot_ms_p50", "ms", [10.0, 30.0, 20.0]),
            Row.of_rounds("packed", LOAD, "tpot_ms_p50", "ms", [20.0, 90.0, 80.0]),
            Row("packed", "wikitext", "perplexity", "", 7.5, interval=(7.0, 8.0)),
            Row("dense", "wikitext", "perplexity", "", 5.0),
        ),
        baseline="dense",
        verdict=Verdict(False, ("round 2 was noisy",), ("few rounds",)),
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    example().write(tmp_path / "deep" / "r.json")
    found = Record.read(tmp_path / "deep" / "r.json")
    assert json.loads((tmp_path / "deep" / "r.json").read_text()) == found.as_json()
    assert found.as_json() == example().as_json() | {
        "provenance": found.provenance, "command": found.command,
    }  # fmt: skip
    assert found.rows == example().rows
    assert found.provenance["commit"] is None or len(found.provenance["commit"]) >= 40


def test_figures_are_found_by_side_load_and_metric() -> None:
    record = example()
    assert record.value("packed", LOAD, "tpot_ms_p50") == 80
    assert record.value("packed", "wikitext", "tpot_ms_p50") is None
    assert record.loads == [LOAD, "wikitext"]
    assert record.metrics == ["tpot_ms_p50", "perplexity"]


def test_ratios_are_paired_by_round_and_not_of_the_medians() -> None:
    found = example().ratio("packed", LOAD, "tpot_ms_p50")
    assert found is not None
    assert (found.median, found.low, found.high) == (3, 2, 4)
    assert found.rounds == (2, 3, 4)
    back = example().ratio("dense", LOAD, "tpot_ms_p50", "packed")
    assert back is not None
    assert back.median == pytest.approx(1 / 3)


def test_a_ratio_without_rounds_is_that_of_the_values() -> None:
    found = example().ratio("packed", "wikitext", "perplexity")
    assert found is not None
    assert found.median == 1.5


@pytest.mark.parametrize(
    "base",
    [
        Row.of_rounds("a", LOAD, "m", "", [0.0, 1.0]),
        Row.of_rounds("a", LOAD, "m", "", [1.0, 1.0, 1.0]),
        Row("a", LOAD, "m", "", None),
        Row("a", "other", "m", "", 1.0),
    ],
)
def test_there_is_no_ratio_where_rounds_do_not_pair_up(base: Row) -> None:
    ours = Row.of_rounds("b", LOAD, "m", "", [1.0, 2.0])
    assert Record("x", {"a": {}, "b": {}}, (base, ours), "a").ratio("b", LOAD, "m") is None


def test_a_number_that_is_none_is_written_as_null(tmp_path: Path) -> None:
    row = Row("a", "text", "perplexity", "", float("inf"))
    Record("x", {"a": {}}, (row,)).write(tmp_path / "r.json")
    assert Record.read(tmp_path / "r.json").value("a", "text", "perplexity") is None


def _without(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda record: record.pop(key)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_without("rows"), "'rows' is missing"),
        (_without("verdict"), "'verdict' is missing"),
        (lambda record: record["verdict"].pop("valid"), "verdict.valid: Field required"),
        (lambda record: record["rows"][0].pop("value"), "rows.0.value: Field required"),
        (lambda record: record["rows"][0].update(rounds=["x"]), "rows.0.rounds.0: Input should be"),
        (lambda record: record.update(sides=["a"]), "sides: Input should be a valid"),
    ],
)
def test_a_damaged_record_is_refused_in_a_sentence(
    tmp_path: Path, damage: Callable[[dict[str, Any]], Any], sentence: str
) -> None:
    record = example().as_json()
    damage(record)
    (tmp_path / "r.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match=sentence) as found:
        Record.read(tmp_path / "r.json")
    assert str(found.value).endswith("measure again.")


@pytest.mark.parametrize("count", [6, 7, 9, 13, 20])
def test_the_interval_holds_the_median_of_a_skewed_distribution(count: int) -> None:
    draws = np.random.default_rng(count).exponential(size=(4000, count))
    true = np.log(2)
    held = np.mean([low <= true <= high for low, high in map(median_interval, draws.tolist())])
    assert 0.94 < held < 0.99


def test_the_interval_of_few_values_is_their_range() -> None:
    assert median_interval([3.0]) == (3, 3)
    assert median_interval([3.0, 1.0, 2.0]) == (1, 3)


def test_a_recorded_command_names_no_folder_of_the_machine() -> None:
    words = ["bench", "/home/me/dense", "q=hf:/home/me/x", "--log=/var/l.txt", "~/a/b",
             "runs/half", "http://127.0.0.1:8000", "--slo", "ttft:5,tpot:3"]  # fmt: skip
    assert command_line(words) == (
        "gblm bench dense q=hf:x --log=l.txt b runs/half http://127.0.0.1:8000 --slo ttft:5,tpot:3"
    )


def test_folders_made_one_after_the_other_are_told_apart() -> None:
    assert provenance()["created"] != provenance()["created"]
