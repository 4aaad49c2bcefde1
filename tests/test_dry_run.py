"""Dry run: it says the bytes of the real folder, and refuses what the run would refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome
from test_families import save_family

from gblm.commands import recipe_options
from gblm.errors import GblmError
from gblm.kernels import native
from gblm.prune import Output, dry_run, prune
from gblm.recipe import Calibration, Recipe

Run = Callable[..., Outcome]
TEXT = Calibration(num_samples=4, seq_len=32)
MIXED = [{"targets": ["q_proj", "k_proj", "v_proj"], "pattern": "dense", "values": "int8"}]


@pytest.fixture
def recipe(tiny: Path, text_file: Path) -> Callable[..., Recipe]:
    def make(**fields: Any) -> Recipe:
        text = TEXT.model_copy(update={"source": str(text_file)})
        base = {"model": str(tiny), "method": "wanda", "calibration": text.model_dump()}
        return Recipe.from_dict(base | fields)

    return make


WAYS: list[dict[str, Any]] = [
    {"method": "magnitude"},
    {"method": "magnitude", "pattern": "0.5", "values": "int8"},
    {"pattern": "2:4", "values": "int4", "head": "int8"},
    {"pattern": "0.55"},
    {"pattern": "0.55", "values": "int4"},
    {"pattern": "8:16", "values": "int8", "layers": MIXED, "ignore": ["layers.0.*"]},
    {"method": "sparsegpt", "pattern": "0.3", "rounding": "obs", "values": "int8"},
    {"method": "sparsegpt", "pattern": "dense", "rounding": "obs", "values": "int4"},
    {"method": "sparsegpt", "pattern": "dense", "rounding": "obs", "values": "int3"},
    {"method": "alps", "pattern": "0.7"},
    {"method": "gblm", "pattern": "2:4", "refit": {}},
    {"method": "magnitude", "reconstruct": {"epochs": 1}},
]


@pytest.mark.parametrize("fields", WAYS, ids=str)
def test_the_bytes_said_are_the_bytes_written(
    recipe: Callable[..., Recipe], tmp_path: Path, fields: dict[str, Any]
) -> None:
    wanted, output = recipe(**fields), Output(tmp_path / "out")
    facts = dry_run(wanted, output)
    json.dumps(facts)
    assert not list(tmp_path.iterdir())
    report = prune(wanted, output)
    assert facts["exact"]
    assert facts["bytes_packed"] == report["bytes_packed"]
    assert facts["bytes_dense"] == report["bytes_dense"]
    assert facts["bits_per_weight"] == report["bits_per_weight"]
    groups = [(g["pattern"], g["linears"], g["bits_per_weight"]) for g in facts["groups"]]
    assert sorted(groups) == sorted(
        (g["pattern"], g["linears"], g["bits_per_weight"]) for g in report["groups"]
    )


def test_four_bit_rows_of_any_length_are_bounded(
    recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    wanted = recipe(method="sparsegpt", pattern="0.5", values="int4")
    facts = dry_run(wanted, Output(tmp_path / "out"))
    report = prune(wanted, tmp_path / "out")
    assert not facts["exact"]
    assert 0.98 * facts["bytes_packed"] < report["bytes_packed"] <= facts["bytes_packed"]


REFUSED: list[dict[str, Any]] = [
    {"pattern": "2:5"},
    {"ignore": ["zzz"]},
    {"method": "nope"},
    {"method": "sparsegpt", "options": {"damping": 2.0}},
    {"layers": [{"targets": ["q_proj"], "values": "int8"}]},
    {"values": "int4:256"},
    {"values": "int3"},
    {"method": "wanda", "calibration": None},
    {"method": "wanda", "pattern": "dense", "refit": {}},
    {"calibration": {"source": "missing.txt"}},
]


@pytest.mark.parametrize("fields", REFUSED, ids=str)
def test_what_prune_refuses_is_refused(
    recipe: Callable[..., Recipe], tmp_path: Path, fields: dict[str, Any]
) -> None:
    wanted, output = recipe(**fields), Output(tmp_path / "out")
    with pytest.raises(GblmError) as by_prune:
        prune(wanted, output)
    with pytest.raises(type(by_prune.value)) as by_dry_run:
        dry_run(wanted, output)
    assert str(by_dry_run.value) == str(by_prune.value)


def test_an_output_in_the_way_is_refused(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(GblmError, match="exists; choose another name"):
        dry_run(recipe(), Output(tmp_path / "out"))


def test_the_command_writes_nothing(gblm: Run, tiny: Path, text_file: Path, tmp_path: Path) -> None:
    words = ["prune", tiny, "--method", "gblm", "--calibration", text_file, "--num-samples", 4,
             "--seq-len", 32, "--output", "out", "--dry-run"]  # fmt: skip
    done = gblm(*words)
    assert done.code == 0, done
    for word in ("pattern  values", "packed: exactly", "disk while it runs, at most"):
        assert word in done.out
    assert done.out.endswith("dry run: nothing was written.\n")
    done = gblm(*words, "--json")
    assert json.loads(done.out)["exact"] is True
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "recovered: alps, 8:16 or dense, int4, spread to 3.7bits, on 4 samples of 32 "
             "tokens, reconstructed, recovered on 65536 tokens"),
        (["--budget", "4bits", "--preset", "fast"], "fast: sparsegpt, 8:16 or dense, int4, spread "
                                                    "to 4bits, on 4 samples of 32 tokens"),
        (["--values", "int8"], "recovered: alps, 8:16, int8, 1 layer dense at each end"),
        (["--pattern", "dense"], "recovered: dense, int4, on 4 samples of 32 tokens"),
    ],
)  # fmt: skip
def test_the_default_is_said_before_it_starts(
    gblm: Run, tiny: Path, text_file: Path, words: list[str], says: str
) -> None:
    text = ["--calibration", text_file, "--num-samples", 4, "--seq-len", 32]
    done = gblm("prune", tiny, *text, *words, "--output", "out", "--dry-run")
    assert done.code == 0, done
    assert f"preset {says}" in done.err


@pytest.mark.parametrize(
    ("isa", "given", "advised"),
    [("avx2", {}, True), ("avx512", {}, False), ("avx2", {"pattern": "dense"}, False),
     ("avx2", {"values": "int8"}, False)],
)  # fmt: skip
def test_where_zeros_are_slower_it_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    isa: str, given: dict[str, str], advised: bool,
) -> None:  # fmt: skip
    monkeypatch.setattr(native, "refusal", lambda: None)
    monkeypatch.setattr(native, "instruction_set", lambda: isa)
    with caplog.at_level("INFO", logger="gblm"):
        recipe_options._advise(**recipe_options.with_preset(**given))
    assert ("AVX2 alone" in caplog.text) is advised


def test_presets_pack_no_head_that_vllm_could_not_serve(
    gblm: Run, text_file: Path, tmp_path: Path
) -> None:
    text = ["--calibration", text_file, "--num-samples", 4, "--seq-len", 32]
    heads = {}
    for family in ("gemma2", "gemma3 text"):
        model = save_family(family, tmp_path / family)
        words = [*text, "--pattern", "dense", "--output", "out", "--dry-run", "--json"]
        heads[family] = json.loads(gblm("prune", model, *words).out)["head"]
    assert heads == {"gemma2": "float", "gemma3 text": "int4:32"}
