from __future__ import annotations

import json
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import frontier
import frontier_cases
import pages
import pytest
import torch
from frontier_cases import CASES

from gblm.methods.pipeline import make_pipeline
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
from gblm.provenance import provenance


def run(name: str, samples: int, seed: int, perplexity: float, **more: Any) -> dict[str, Any]:
    case = CASES[name]
    bits = {"dense": 16.0, "int8": 8.22, "sparsegpt-24": 9.0, "alps-24-rec": 9.0}.get(name, 2.25)
    return {
        "case": name, "samples": samples, "seed": seed, "recipe": dict(case.recipe),
        "narrow": case.narrow, "cpu_seconds": 60.0 + 60 * seed, "bits_per_weight": bits,
        "perplexity": {"8w": perplexity, "16w": perplexity + 1, "pydoc 8w": perplexity / 2},
        "tokens_sha256": {"wikitext": "1", "pydoc": "2"}, "calibration_text": "valid.txt",
        "provenance": provenance(), **more,
    }  # fmt: skip


def made_up() -> list[dict[str, Any]]:
    return [
        run("dense", 0, 0, 27.5),
        run("int8", 0, 0, 27.6),
        *(run("sparsegpt-24", 64, seed, 56.0 + seed) for seed in (0, 1, 2)),
        run("sparsegpt-24", 16, 0, 60.25),
        run("alps-24-rec", 64, 0, 43.0),
        run("int2-gptq", 64, 0, 8000.0),
    ]


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "frontier.json"
    for each in made_up():
        frontier.add(path, each)
    return path


@pytest.mark.parametrize("name", [name for name in CASES if name != "dense"])
def test_every_case_is_a_recipe(name: str) -> None:
    case = CASES[name]
    assert case.recipe
    recipe = case.build("model", "valid.txt", 16, 3)
    assert recipe.dtype == "float32"
    assert recipe.refit is None
    make_pipeline(recipe.method, recipe.options, None, recipe.rounding)
    assert (recipe.calibration is None) == (name in ("int8", "int4-rtn"))
    if recipe.calibration is not None:
        assert (recipe.calibration.num_samples, recipe.calibration.seed) == (16, 3)
        assert recipe.calibration.order == "sequential"


@pytest.mark.parametrize("name", [name for name in CASES if re.search(r"-[23]\.\d", name)])
def test_sparsities_keep_the_budget_that_their_name_says(name: str) -> None:
    """Bits as the formats lay them out, on SmolLM2's shapes."""
    from gblm.sparse.formats import format_for
    from gblm.sparse.patterns import parse
    from gblm.sparse.values import parse_values

    recipe, budget = CASES[name].recipe, float(name.split("-")[1])
    pattern, size, count = parse(recipe["pattern"]), 0.0, 0
    for shape, linears in (((576, 576), 2), ((192, 576), 2), ((1536, 576), 2), ((576, 1536), 1)):
        fmt = format_for(pattern, parse_values(recipe["values"]).resolve("w", shape[1]))
        for spec in (spec for part, spec in fmt.layout(shape).items() if part != "values"):
            size += linears * 8 * torch.Size(spec.shape).numel() * spec.dtype.itemsize
        # Codes are whole bytes a row, which half of the rows fill.
        size += linears * (4 * shape[0] * shape[1] * (1 - pattern.sparsity) + 2 * shape[0])
        count += linears * shape[0] * shape[1]
    assert budget - 0.02 < size / count <= budget


def test_cases_without_calibration_run_once() -> None:
    given = Namespace(cases=["int8", "sparsegpt-24"], samples=[16, 64], seeds=[0, 1])
    assert frontier.keys(given) == [
        ("int8", 0, 0), ("sparsegpt-24", 16, 0), ("sparsegpt-24", 16, 1),
        ("sparsegpt-24", 64, 0), ("sparsegpt-24", 64, 1),
    ]  # fmt: skip


def test_runs_that_are_there_are_skipped(
    record: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only what is missing, or was made otherwise, starts a process."""
    (text_file.parent / "test.txt").write_text(text_file.read_text())
    older = run("alps-24-rec", 64, 0, 43.0)
    older["recipe"]["reconstruct"] = {"epochs": 1}
    frontier.add(record, older)
    started = []

    def alone(script: str, one: str, name: str, *words: str) -> dict[str, Any]:
        started.append((name, *map(int, words[:2]), words[2]))
        return run(name, int(words[0]), int(words[1]), 40.0)

    monkeypatch.setattr(pages, "alone", alone)
    command = ["frontier.py", "--output", str(record), "--wikitext", str(text_file.parent),
               "--cases", "dense", "sparsegpt-24", "alps-24-rec", "--samples", "64",
               "--seeds", "0", "3"]  # fmt: skip
    monkeypatch.setattr("sys.argv", command)
    frontier.main()
    wanted = [("sparsegpt-24", 64, 3), ("alps-24-rec", 64, 0), ("alps-24-rec", 64, 3)]
    assert started == [(*key, "--wikitext") for key in wanted]
    frontier.main()
    assert len(started) == 3
    runs = pages.read_runs(record)
    assert len(runs) == len(made_up()) + 2
    assert [r["perplexity"]["8w"] for r in runs if frontier.key_of(r) in wanted] == [40] * 3


def test_table_has_means_spreads_and_minutes(record: Path) -> None:
    text = frontier.table(record)
    assert "| 2:4, SparseGPT | 9.00 | 64 | 3 | 57.0 ± 1.0 | 58.0 ± 1.0 | 28.5 ± 0.5 | 2.0 |" in text
    assert "| int8 | 8.22 | – | – | 27.6 | 28.6 | 13.8 | 1.0 |" in text
    assert "| 2:4, SparseGPT | 9.00 | 16 | 1 | 60.2 | 61.2 | 30.1 | 1.0 |" in text
    assert "| int2, GPTQ | 2.25 | 64 | 1 | 8000 |" in text
    assert "× 256 tokens of valid.txt; mean ± standard deviation over the seeds" in text
    assert re.search(r"; commit [0-9a-f]{12}", text)


def test_perplexities_of_different_texts_are_not_mixed(record: Path) -> None:
    frontier.add(record, run("int4-gptq", 16, 0, 1.0, tokens_sha256={"wikitext": "3"}))
    with pytest.raises(ValueError, match="different texts"):
        frontier.table(record)


@pytest.mark.parametrize(("name", "limit"), [("int3-gptq-rec", 3), ("int2-gptq", 1)])
def test_narrow_codes_stay_within_their_limit(
    tiny: Path, text_file: Path, tmp_path: Path, name: str, limit: int
) -> None:
    case = CASES[name]
    recipe = case.build(str(tiny), str(text_file), 2, 0)
    recipe = recipe.model_copy(
        update={"calibration": recipe.calibration.model_copy(update={"seq_len": 16})}
    )
    done = frontier.prune_case(case, recipe, tmp_path / "out")
    with PackedReader(ModelFolder.open(tmp_path / "out")) as packed:
        codes = [packed.linears[n].fmt.kept(packed.parts(n)) for n in packed.linears]
        scales = {packed.linears[n].fmt.values.group_size for n in packed.linears}
    assert max(int(c.abs().max()) for c in codes) == limit
    # One scale of 16 bits a group.
    low, high = (case.narrow + 16 / size for size in (max(scales), min(scales)))
    assert low <= done["bits_per_weight"] <= high
    assert frontier_cases.NARROW[case.narrow] == limit


def test_a_run_measures_all_protocols(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packed model of the tiny LLaMA, on texts of 16 tokens a window."""
    for split in ("valid", "test"):
        (tmp_path / f"{split}.txt").write_text("Sphinx of black quartz, judge my vow! " * 20)
    monkeypatch.setattr(frontier, "WINDOW", 16)
    monkeypatch.setattr(frontier_cases, "SEQ_LEN", 16)
    given = Namespace(model=tiny, wikitext=tmp_path, full=True)
    found = frontier.measure(frontier.Key("sparsegpt-24", 2, 1), given)
    assert list(found["perplexity"]) == ["8w", "16w", "pydoc 8w", "full"]
    assert all(value > 1 for value in found["perplexity"].values())
    assert found["full_windows"] == 760 // 16
    assert found["bits_per_weight"] == 9
    assert json.loads(json.dumps(found))["recipe"] == CASES["sparsegpt-24"].recipe
