"""Search: budgets are read, spread over linears, answered with recipes, made and measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from conftest import Run, save_tiny_model

from gblm.cli import cli
from gblm.errors import InputError, UsageError
from gblm.evaluate.perplexity import Protocol
from gblm.evaluate.run import Evaluation, run_evaluation
from gblm.files import read_json
from gblm.methods.obs import prepare_obs
from gblm.methods.sparsegpt import SparseGPT
from gblm.prune import prune
from gblm.prune.job import open_job
from gblm.recipe import FUSED, Calibration, Recipe, Refitting
from gblm.record import Record, Row
from gblm.search import run as running
from gblm.search.allocate import LinearSpec, family, measured, total_bytes, uniform
from gblm.search.candidates import (
    STEPS,
    Question,
    allocations,
    answer,
    parse_budget,
    recipe_for,
    verdict,
)
from gblm.search.examine import Examined, Space, examine
from gblm.search.run import METRIC, UNPRUNED, Measuring, best, is_measured, ranked, search, slug
from gblm.search.sensitivity import GRID, SHARE, Curve, Judgement, column_costs, curve
from gblm.sparse.formats import Format, format_for
from gblm.sparse.patterns import NM, Dense, Unstructured, parse
from gblm.sparse.values import FLOAT, parse_values

INT4 = parse_values("int4:64")


@pytest.fixture(scope="module")
def base(tiny: Path, text_file: Path) -> Recipe:
    text = Calibration(source=str(text_file), num_samples=4, seq_len=32, order="sequential")
    return Recipe(
        model=str(tiny), method="sparsegpt", pattern="dense", values="int8", rounding="obs",
        calibration=text,
    )  # fmt: skip


@pytest.fixture(scope="module")
def model(base: Recipe) -> Examined:
    return examine(base, Space())


# Reading.


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [
        ("3.5bits", "bits", 3.5),
        ("4 bits", "bits", 4),
        ("2.1GB", "bytes", 2.1e9),
        ("150MB", "bytes", 150e6),
        ("1GiB", "bytes", 2**30),
        (".5MB", "bytes", 5e5),
    ],
)
def test_budgets_are_read(text: str, unit: str, amount: float) -> None:
    budget = parse_budget(text)
    assert (budget.unit, budget.amount, str(budget)) == (unit, pytest.approx(amount), text)


@pytest.mark.parametrize(
    "text", ["", "3.5", "bits", "-1bits", "0bits", "0.0GB", "3,5bits", "1e3MB", "5s", "12ms",
             "nanbits", "infGB", "3.5bits/token", "1" * 400 + "GB"],
)  # fmt: skip
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"budget .*(is unknown|above 0)"):
        parse_budget(text)


# Sensitivity.


def test_costs_are_the_pivots_of_the_sweep() -> None:
    inputs = torch.randn(200, 24) @ torch.randn(24, 24)
    hessian = inputs.t() @ inputs
    wanted = prepare_obs({"hessian": hessian}, 0.01)["pivots"].reciprocal()
    assert torch.allclose(column_costs(hessian, makes_up=True), wanted, rtol=1e-3)
    assert torch.equal(column_costs(hessian, makes_up=False), hessian.diagonal())
    # Later columns can only lower what an error costs.
    assert bool((wanted <= 1.02 * hessian.diagonal() + 0.01 * hessian.diagonal().mean()).all())


def test_inputs_that_are_always_zero_cost_nothing() -> None:
    inputs = torch.randn(50, 8)
    inputs[:, 3] = 0
    assert column_costs(inputs.t() @ inputs, makes_up=True)[3] == 0


def test_more_zeros_and_coarser_codes_are_never_better(model: Examined) -> None:
    for own in model.curves.values():
        for kind in ("float", "int8", "int4"):
            losses = own.sparse[kind]
            assert len(losses) == len(GRID)
            # Small weights may be nearer to zero than to a code: rounding is no lower bound.
            assert losses[-1] > losses[30] >= losses[0] - 1e-12 or kind == "int4"
        assert own.sparse["float"][0] == 0 < own.sparse["int8"][0] < own.sparse["int4"][0]
        assert own.fixed["2:4", "float"] > 0.9 * own.sparse["float"][50]


@pytest.mark.parametrize("text", ["0.3", "0.5", "0.7", "0.85", "2:4"])
def test_predicted_errors_are_those_of_the_sweep(text: str) -> None:
    """Σ e²/d of static weights, times `crowding`, against δ H δᵀ of weights that SparseGPT made."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.eye(256) + torch.randn(256, 256, generator=generator) / 16
    inputs = torch.randn(1024, 256, generator=generator) @ mix
    hessian, weight = inputs.t() @ inputs, torch.randn(96, 256, generator=generator)
    costs = column_costs(hessian, makes_up=True)
    ways = Judgement({}, [NM(2, 4)], makes_up=True, rounding="obs")
    found = curve(weight, torch.ones(96), costs, costs, {"float": FLOAT}, ways)
    method = SparseGPT()
    pruned = method.prune(weight, method.prepare({"hessian": hessian}), parse(text))
    error = weight - pruned.weight
    real = SHARE * 0.25 * float((error @ hessian * error).sum())
    assert found.loss(format_for(parse(text))) == pytest.approx(real, rel=0.2)


def test_a_curve_is_a_line_between_its_points() -> None:
    curve = Curve({"float": tuple(share**2 for share in GRID)}, {("2:4", "float"): 7.0})
    assert curve.loss(format_for(Dense())) == 0
    assert curve.loss(format_for(NM(2, 4))) == 7
    assert curve.loss(format_for(Unstructured(0.5))) == pytest.approx(0.25)
    assert curve.loss(format_for(Unstructured(0.505))) == pytest.approx((0.25 + 0.51**2) / 2)
    assert curve.loss(format_for(Unstructured(0.95))) == pytest.approx(0.95**2)


def test_sensitivities_are_drawn_together_and_keep_their_sum(model: Examined) -> None:
    raw, drawn = {}, {}
    for linear in model.linears:
        choice = model.sparse(linear, "float", 0.5)
        raw[linear] = model.curves[linear.name].loss(choice)
        drawn[linear] = model.loss(linear, choice)
    assert sum(drawn.values()) == pytest.approx(sum(raw.values()))
    per_weight = [[own[x] / x.weights for x in model.linears] for own in (raw, drawn)]
    spreads = [math.log(max(own) / min(own)) for own in per_weight]
    assert spreads[1] == pytest.approx(0.7 * spreads[0])
    assert sorted(raw, key=lambda x: raw[x] / x.weights) == sorted(
        drawn, key=lambda x: drawn[x] / x.weights
    )


# Allocating.


def toy(sensitive: str = "") -> tuple[list[LinearSpec], Callable[[LinearSpec, Format], float]]:
    """Two decoder layers of fused linears; one of them may be a hundred times as sensitive."""
    linears = [
        LinearSpec(f"l.{layer}.{name}", (256, 256), torch.bfloat16, f"l.{layer}.{unit}")
        for layer in range(2)
        for name, unit in [
            ("q_proj", "q_proj"), ("k_proj", "q_proj"), ("v_proj", "q_proj"), ("o_proj", "o_proj"),
        ]
    ]  # fmt: skip

    def loss(linear: LinearSpec, choice: Format) -> float:
        factor = 100.0 if linear.name == sensitive else 1.1 if ".1." in linear.name else 1.0
        rounding = 0.02 if choice.values.kind == "int4" else 0.0
        return factor * (choice.pattern.sparsity**3 + rounding)

    return linears, loss


def bits(linears: list[LinearSpec], amount: float) -> float:
    return parse_budget(f"{amount}bits").limit(sum(linear.weights for linear in linears), 0)


def options(linear: LinearSpec) -> Iterator[Format]:
    for values in (FLOAT, INT4):
        yield format_for(Dense(), values)
        yield format_for(NM(2, 4), values)
        for sparsity in STEPS:
            yield format_for(Unstructured(sparsity), values)


def loose(linear: LinearSpec) -> Iterator[Format]:
    yield format_for(Dense(), INT4)
    for sparsity in STEPS:
        yield format_for(Unstructured(sparsity), INT4)


def int4(linear: LinearSpec, sparsity: float) -> Format:
    return format_for(Unstructured(sparsity), INT4)


@pytest.mark.parametrize("amount", [3.0, 3.3, 4.6, 9.5, 17.0])
@pytest.mark.parametrize("sensitive", ["", "l.0.o_proj", "l.1.k_proj"])
def test_a_measured_allocation_uses_the_budget_up(amount: float, sensitive: str) -> None:
    linears, loss = toy(sensitive)
    limit = bits(linears, amount)
    found = measured(linears, options, limit, loss)
    assert found is not None
    total = total_bytes(linears, found)
    assert total <= limit
    # Whatever one linear could still gain within its family would cost more than is left.
    for linear in linears:
        now = found[linear.name]
        for better in options(linear):
            cost = linear.num_bytes(better) - linear.num_bytes(now)
            if family(better) == family(now) and total + cost <= limit:
                assert loss(linear, better) >= loss(linear, now) - 1e-12


@pytest.mark.parametrize("amount", [3.0, 3.3, 4.0, 4.5])
def test_uniform_is_the_densest_that_holds(amount: float) -> None:
    linears, _ = toy()
    limit = bits(linears, amount)
    found = uniform(linears, int4, limit)
    assert found is not None
    (sparsity,) = {choice.pattern.sparsity for choice in found.values()}
    assert total_bytes(linears, found) <= limit
    denser = {linear.name: int4(linear, sparsity - 0.001) for linear in linears}
    assert total_bytes(linears, denser) > limit


@pytest.mark.parametrize("sensitive", ["l.0.o_proj", "l.1.k_proj"])
@pytest.mark.parametrize("amount", [2.7, 3.4, 4.0])
def test_measured_beats_uniform_and_spares_the_sensitive(sensitive: str, amount: float) -> None:
    linears, loss = toy(sensitive)
    limit = bits(linears, amount)
    even, found = uniform(linears, int4, limit), measured(linears, loose, limit, loss)
    assert even is not None
    assert found is not None

    def total(allocation: dict[str, Format]) -> float:
        return sum(loss(linear, allocation[linear.name]) for linear in linears)

    assert total(found) < total(even)
    plain, plain_loss = toy()
    before = measured(plain, loose, limit, plain_loss)
    assert before is not None
    (own,) = (linear for linear in linears if linear.name == sensitive)
    assert own.num_bytes(found[sensitive]) >= own.num_bytes(before[sensitive])
    assert found[sensitive].pattern.sparsity < max(c.pattern.sparsity for c in found.values())


@pytest.mark.parametrize("amount", [2.9, 4.4, 6.5, 9.1])
@pytest.mark.parametrize("sensitive", ["", "l.0.q_proj"])
def test_parts_of_one_linear_share_format_and_values(amount: float, sensitive: str) -> None:
    linears, loss = toy(sensitive)
    found = measured(linears, options, bits(linears, amount), loss)
    assert found is not None
    for layer in range(2):
        parts = [found[f"l.{layer}.{part}"] for part in FUSED[0]]
        assert len({family(part) for part in parts}) == 1


def test_what_nothing_holds_is_nothing() -> None:
    linears, loss = toy()
    assert measured(linears, options, bits(linears, 0.5), loss) is None
    assert uniform(linears, int4, bits(linears, 0.5)) is None


# Answers.


@pytest.mark.parametrize("text", ["3.4bits", "5bits", "9.5bits", "80kB"])
def test_every_candidate_holds_its_budget_and_becomes_a_recipe(
    model: Examined, base: Recipe, text: str
) -> None:
    limit = parse_budget(text).limit(model.weights, model.rest_bytes)
    found = allocations(model, limit)
    assert list(found)[:2] == ["int8 dense", "int4 dense"]
    assert "mixed measured" in found
    refit = base.model_copy(update={"refit": Refitting()})
    for name, allocation in found.items():
        assert "dense" in name or total_bytes(model.linears, allocation) <= limit, name
        recipe = recipe_for(refit, model, allocation)
        again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
        with open_job(again) as job:
            assert job.formats == allocation


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_a_budget_in_bytes_is_that_of_the_folder(base: Recipe, tmp_path: Path, method: str) -> None:
    """Wanda counts zeros by row, SparseGPT over the matrix."""
    small = base.model_copy(update={"head": "int8", "method": method})
    result = answer(Question(small, parse_budget("95kB"), Space(("int4:auto",))))
    row = next(row for row in result["rows"] if row["fits"])
    report = prune(Recipe.from_dict(row["recipe"]), tmp_path / "out")
    assert report["bytes_packed"] <= row["bytes"] <= 95_000
    assert report["bytes_packed"] == pytest.approx(row["bytes"], rel=0.01)
    assert report["bits_per_weight"] == pytest.approx(row["bits_per_weight"], rel=0.01)


def test_the_answer_ranks_and_says_when_dense_is_better(base: Recipe) -> None:
    result = answer(Question(base, parse_budget("8.6bits")))
    json.dumps(result)
    fits = [row for row in result["rows"] if row["fits"]]
    assert [row["loss"] for row in fits] == sorted(row["loss"] for row in fits)
    assert all(row["ratio"] == pytest.approx(math.exp(row["loss"]), rel=1e-4) for row in fits)
    assert "is the better answer at 8.6bits" in result["verdict"]
    assert {"int8 dense", "int4 dense"} <= {row["name"] for row in fits}
    narrow = answer(Question(base, parse_budget("3.3bits"), Space(("int4:auto",), ("2:4",))))
    assert not {row["name"] for row in narrow["rows"]} & {"int4 uniform", "int8 dense"}
    assert "no dense model holds 3.3bits: the best with zeros is int4" in narrow["verdict"]


def test_verdicts() -> None:
    def row(name: str, ratio: float, dense: bool, fits: bool = True) -> dict[str, Any]:
        return {"name": name, "ratio": ratio, "dense": dense, "fits": fits,
                "bits_per_weight": 4.2, "bytes": 100}  # fmt: skip

    budget = parse_budget("4.3bits")
    close = verdict([row("a", 1.2, False), row("int4 dense", 1.21, True)], budget)
    assert close.startswith("int4 dense (4.20 bits, 1.210x the perplexity) is the better answer")
    far = verdict([row("a", 1.2, False), row("int4 dense", 1.3, True)], budget)
    assert far.startswith("zeros are worth it at 4.3bits: a")
    none = verdict([row("a", 1.2, False), row("int4 dense", 1.1, True, fits=False)], budget)
    assert "no dense model holds 4.3bits: the best with zeros is a (4.20 bits" in none


def test_what_cannot_be_is_said(base: Recipe, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"too small: nine zeros of ten still take about \d"):
        answer(Question(base, parse_budget("0.3bits")))
    with pytest.raises(UsageError, match="needs calibration text"):
        answer(Question(base.model_copy(update={"calibration": None}), parse_budget("4bits")))
    with pytest.raises(UsageError, match="a search takes unstructured and N:M patterns"):
        answer(Question(base, parse_budget("4bits"), Space(patterns=("0.5",))))
    odd = save_tiny_model(tmp_path / "odd", intermediate_size=88)
    found = examine(base.model_copy(update={"model": str(odd)}), Space())
    assert set(found.specs) == {"float"}
    assert any("int4:auto is left out" in note and "88 columns" in note for note in found.notes)


# The command line.


TEXT = ["--num-samples", 2, "--seq-len", 16]


def test_a_predicted_recipe_is_one_that_prune_takes(
    gblm: Run, tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ["search", tiny, "--calibration", text_file, *TEXT]
    done = gblm(*words, "--budget", "3.6bits", "--write", "recipe.json")
    assert done.code == 0, done
    assert "int4 dense (over budget)" in done.out
    assert "no dense model holds 3.6bits" in done.out
    recipe = Recipe.from_file(tmp_path / "recipe.json")
    assert (recipe.method, recipe.rounding) == ("sparsegpt", "obs")
    assert recipe.calibration is not None
    assert recipe.calibration.order == "sequential"
    done = gblm("prune", "--recipe", "recipe.json", "--output", "out", "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["bits_per_weight"] <= 3.6
    done = gblm(*words, "--budget", "9.5bits", "--method", "wanda", "--pattern", "2:4",
                "--values", "float", "--json")  # fmt: skip
    assert done.code == 0, done
    rows = json.loads(done.out)["rows"]
    assert {row["recipe"]["method"] for row in rows} == {"wanda"}
    ways = [way for row in rows for way in (row["recipe"], *row["recipe"]["layers"])]
    assert {way["values"] for way in ways} == {"float"}
    assert {way["pattern"] for way in ways} <= {"2:4", "dense"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--budget", "3bits", "--pattern", "0.5"], "which decides the sparsity"),
        (["--budget", "3bits", "--limit", "2"], "--limit says how candidates are measured"),
    ],
)
def test_mistakes(tiny: Path, text_file: Path, words: list[str], sentence: str) -> None:
    text = ["--calibration", str(text_file), "--seq-len", "16"]
    with pytest.raises((click.UsageError, UsageError), match=sentence):
        cli.main(["search", str(tiny), *words, *text], standalone_mode=False, obj={})


# Searching.


@pytest.fixture
def question(base: Recipe) -> Question:
    return Question(base, parse_budget("3.5bits"), Space(("int4:auto",)))


@pytest.fixture
def how(text_file: Path, tmp_path: Path) -> Measuring:
    return Measuring(tmp_path / "found", 2, Protocol(str(text_file), 32, 2))


def test_a_search_measures_and_goes_on(
    question: Question, how: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = running.prune

    def counted(recipe: Recipe, output: Any, progress: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(output.folder.name)
        return real(recipe, output, progress)

    monkeypatch.setattr(running, "prune", counted)
    with pytest.raises(KeyboardInterrupt):
        search(question, how)
    assert len(made) == 2
    monkeypatch.setattr(running, "answer", None)  # candidates are not ranked again
    made[:] = [made[0]]
    record = search(question, how)
    assert len(made) == 2
    assert Record.read(how.folder / "search.json") == record
    names = ranked(record)
    assert len(names) == 3
    values = [row.value for name in names for row in record.rows if row.side == name]
    assert values == sorted(value for value in values if value is not None)
    assert "int4 dense" in {name for name in names if not record.sides[name]["fits"]}
    assert all(
        record.sides[name]["bits_per_weight"] <= 3.5
        for name in names if record.sides[name]["fits"]
    )  # fmt: skip
    folders = [path for path in how.folder.iterdir() if path.is_dir()]
    assert folders == [how.folder / slug(best(record))]
    assert (folders[0] / "model.safetensors").exists()
    # Nothing is left to do.
    monkeypatch.setattr(running, "prune", None)
    monkeypatch.setattr(running, "run_evaluation", None)
    assert search(question, how).rows == record.rows


def test_every_measured_figure_is_that_of_the_folder(
    question: Question, how: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "_remove_others", lambda how, record: None)
    record = search(question, how)
    folders = sorted(path.name for path in how.folder.iterdir() if path.is_dir())
    assert folders == sorted(map(slug, ranked(record)))
    load = record.loads[0]
    models = {name: how.folder / slug(name) for name in ranked(record)}
    models[UNPRUNED] = Path(question.recipe.model)
    for name, folder in models.items():
        again = run_evaluation(Evaluation(str(folder), (how.protocol,), without_baseline=True))
        assert record.value(name, load, METRIC) == pytest.approx(again.rows[0].value)
    for name in ranked(record):
        report = read_json(models[name] / "sparsity_report.json")
        assert record.sides[name]["bytes"] == report["bytes_packed"]
        assert record.sides[name]["bytes"] <= record.sides[name]["predicted"]["bytes"]


def evaluated(perplexity: float) -> Record:
    return Record("eval", {"x": {}}, (Row("x", "p", METRIC, "", perplexity),))


def test_a_finished_folder_is_not_made_again(
    question: Question, how: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*args: Any, **kwargs: Any) -> Any:
        if any(how.folder.glob("*/recipe.json")):
            raise KeyboardInterrupt
        return evaluated(300.0)

    monkeypatch.setattr(running, "run_evaluation", cut_off)
    with pytest.raises(KeyboardInterrupt):
        search(question, how)
    (folder,) = (path.parent for path in how.folder.glob("*/recipe.json"))
    before = (folder / "MANIFEST.json").stat().st_mtime_ns
    monkeypatch.undo()
    monkeypatch.setattr(running, "_remove_others", lambda how, record: None)
    record = search(question, how)
    assert (folder / "MANIFEST.json").stat().st_mtime_ns == before
    assert next(row.value for row in record.rows if row.side == UNPRUNED) == 300.0


def test_another_search_is_refused(
    question: Question, how: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(asked: Evaluation, progress: Any) -> Any:
        if asked.model != question.recipe.model:
            raise KeyboardInterrupt
        return evaluated(300.0)

    monkeypatch.setattr(running, "run_evaluation", measure)
    with pytest.raises(KeyboardInterrupt):
        search(question, how)
    with pytest.raises(InputError, match=r"of another search .budget differ"):
        search(replace(question, budget=parse_budget("4bits")), how)
    (how.folder / "search.json").unlink()
    with pytest.raises(InputError, match="is not empty, and no search"):
        search(question, how)


def test_a_perplexity_without_end_comes_last(
    question: Question, how: Measuring, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([300.0, math.inf, 500.0, 700.0])

    def measure(asked: Evaluation, progress: Any) -> Any:
        return evaluated(next(values))

    monkeypatch.setattr(running, "run_evaluation", measure)
    first = search(question, how)
    again = search(question, how)
    assert ranked(first) == ranked(again)
    assert again.value(ranked(again)[-1], "p", METRIC) is None
    assert all(is_measured(again, name) for name in [UNPRUNED, *ranked(again)])


def test_search_on_the_command_line(gblm: Run, tiny: Path, text_file: Path, tmp_path: Path) -> None:
    done = gblm(
        "search", tiny, "--budget", "3.5bits", "--values", "int4", "--output", "found", "--limit",
        1, "--text", text_file, "--calibration", text_file, *TEXT, "--write", "best.json",
    )  # fmt: skip
    assert done.code == 0, done
    assert "unpruned" in done.out
    assert "best within 3.5bits: found/" in done.out
    record = Record.read(tmp_path / "found/search.json")
    assert record.command.startswith(f"gblm search {tiny.name} --budget 3.5bits")
    made = Recipe.from_file(tmp_path / "found" / slug(best(record)) / "recipe.json")
    assert Recipe.from_file(tmp_path / "best.json") == made
