"""Search: budgets are read, spread over linears, and answered with recipes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Run, save_tiny_model

from gblm.errors import UsageError
from gblm.methods.obs import prepare_obs
from gblm.methods.sparsegpt import SparseGPT
from gblm.prune import prune
from gblm.prune.job import open_job
from gblm.recipe import FUSED, Calibration, Recipe, Refitting
from gblm.search.allocate import LinearSpec, family, measured, total_bytes
from gblm.search.candidates import (
    STEPS,
    allocations,
    answer,
    parse_budget,
    recipe_for,
)
from gblm.search.examine import Examined, Space, examine
from gblm.search.sensitivity import GRID, OF_ZEROS, Curve, Judgement, column_costs, curve
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
        for kind in ("float", "int8", "int4", "int3"):
            losses = own.sparse[kind]
            assert len(losses) == len(GRID)
            # Small weights may be nearer to zero than to a code: rounding is no lower bound.
            assert losses[-1] > losses[30] >= losses[0] - 1e-12 or kind in ("int4", "int3")
        assert own.sparse["float"][0] == 0 < own.sparse["int8"][0] < own.sparse["int4"][0]
        assert own.sparse["int4"][0] < own.sparse["int3"][0]
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
    real = OF_ZEROS * 0.25 * float((error @ hessian * error).sum())
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
        choice = model.fmt(linear, "float", Unstructured(0.5))
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


@pytest.mark.parametrize("amount", [2.2, 2.7, 3.3, 4.0])
@pytest.mark.parametrize("sensitive", ["", "l.0.o_proj", "l.1.k_proj"])
def test_a_measured_allocation_holds_the_budget(amount: float, sensitive: str) -> None:
    linears, loss = toy(sensitive)
    limit = bits(linears, amount)
    found = measured(linears, loose, limit, loss)
    assert found is not None
    # What is left is less than the step of one unit.
    assert 0.9 * limit < total_bytes(linears, found) <= limit


@pytest.mark.parametrize("sensitive", ["l.0.o_proj", "l.1.k_proj"])
@pytest.mark.parametrize("amount", [2.7, 3.4, 4.0])
def test_measured_beats_an_equal_share_and_spares_the_sensitive(
    sensitive: str, amount: float
) -> None:
    linears, loss = toy(sensitive)
    limit = bits(linears, amount)
    found = measured(linears, loose, limit, loss)
    assert found is not None

    def total(allocation: dict[str, Format]) -> float:
        return sum(loss(linear, allocation[linear.name]) for linear in linears)

    for sparsity in STEPS:
        even = {x.name: format_for(Unstructured(sparsity), INT4) for x in linears}
        assert total_bytes(linears, even) > limit or total(found) < total(even)
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


# Answers.


@pytest.mark.parametrize("text", ["3.4bits", "5bits", "9.5bits", "80kB"])
def test_every_candidate_holds_its_budget_and_becomes_a_recipe(
    model: Examined, base: Recipe, text: str
) -> None:
    limit = parse_budget(text).limit(model.weights, model.rest_bytes)
    found = allocations(model, limit)
    assert list(found)[:3] == ["int8 dense", "int4 dense", "int3 dense"]
    assert any("measured" in name for name in found)
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
    result = answer(small, parse_budget("95kB"), Space(("int4:auto",)))
    row = next(row for row in result["rows"] if row["fits"])
    report = prune(Recipe.from_dict(row["recipe"]), tmp_path / "out")
    assert report["bytes_packed"] <= row["bytes"] <= 95_000
    assert report["bytes_packed"] == pytest.approx(row["bytes"], rel=0.01)
    assert report["bits_per_weight"] == pytest.approx(row["bits_per_weight"], rel=0.01)


def test_the_answer_ranks_what_holds_the_budget(base: Recipe) -> None:
    result = answer(base, parse_budget("8.6bits"))
    json.dumps(result)
    fits = [row for row in result["rows"] if row["fits"]]
    assert [row["loss"] for row in fits] == sorted(row["loss"] for row in fits)
    assert all(row["ratio"] == pytest.approx(math.exp(row["loss"]), rel=1e-4) for row in fits)
    assert {"int8 dense", "int4 dense"} <= {row["name"] for row in fits}
    assert fits[0]["dense"]
    assert result["verdict"].endswith("nothing with zeros is better.")
    narrow = answer(base, parse_budget("3.3bits"), Space(("int4:auto",), ("2:4",)))
    names = [row["name"] for row in narrow["rows"]]
    assert not {*names} & {"int4 measured", "int8 dense"}
    assert (names[-1], narrow["rows"][-1]["fits"]) == ("int4 dense", False)
    assert narrow["verdict"].startswith("zeros are worth it at 3.3bits, by prediction: int4 2:4")


def test_what_cannot_be_is_said(
    base: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UsageError, match=r"too small: these patterns and values take 2\.\d+bits"):
        answer(base, parse_budget("0.3bits"))
    with pytest.raises(UsageError, match=r"these patterns and values take 3\.[12]\d*bits at least"):
        answer(base, parse_budget("3.1bits"), Space(("int4:auto",), ("2:4",)))
    with pytest.raises(UsageError, match="needs calibration text"):
        answer(base.model_copy(update={"calibration": None}), parse_budget("4bits"))
    with pytest.raises(UsageError, match="a search takes unstructured and N:M patterns"):
        answer(base, parse_budget("4bits"), Space(patterns=("0.5",)))
    odd = save_tiny_model(tmp_path / "odd", intermediate_size=88)
    found = examine(base.model_copy(update={"model": str(odd)}), Space())
    assert set(found.specs) == {"float"}
    assert "int4:auto is left out" in caplog.text
    assert "88 columns" in caplog.text


# The command line.


TEXT = ["--num-samples", 2, "--seq-len", 16]


def test_a_predicted_recipe_is_one_that_prune_takes(
    gblm: Run, tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ["search", tiny, "--calibration", text_file, *TEXT]
    done = gblm(*words, "--budget", "3.6bits", "--write", "recipe.json")
    assert done.code == 0, done
    assert "int4 dense (over budget)" in done.out
    recipe = Recipe.from_file(tmp_path / "recipe.json")
    assert (recipe.method, recipe.rounding) == ("alps", "obs")
    assert recipe.calibration is not None
    assert recipe.calibration.order == "sequential"
    assert recipe.recover is not None
    (tmp_path / "recipe.json").write_text(
        recipe.model_copy(update={"recover": None}).model_dump_json()
    )
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


def test_prune_spreads_a_budget_by_itself(
    gblm: Run, tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    words = [tiny, "--calibration", text_file, *TEXT, "--recover", 0, "--budget", "3.9bits",
             "--json"]  # fmt: skip
    done = gblm("prune", *words, "--output", "out")
    assert done.code == 0, done
    assert 3.4 < json.loads(done.out)["bits_per_weight"] <= 3.9
    recipe = Recipe.from_file(tmp_path / "out" / "recipe.json")
    assert {recipe.pattern, *(choice.pattern for choice in recipe.layers)} == {"8:16", "dense"}
    assert (recipe.values, recipe.dense_ends) == ("int4:auto", 0)
    # A run that is cut off goes on only if the same command spreads alike.
    again = gblm("prune", *words, "--output", "again")
    assert again.code == 0, again
    assert Recipe.from_file(tmp_path / "again" / "recipe.json") == recipe


def test_without_zeros_a_budget_decides_the_bits(
    gblm: Run, tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    words = [tiny, "--calibration", text_file, *TEXT, "--recover", 0, "--pattern", "dense",
             "--budget", "3.9bits", "--output", "out", "--json"]  # fmt: skip
    done = gblm("prune", *words)
    assert done.code == 0, done
    report = json.loads(done.out)
    assert 3.4 < report["bits_per_weight"] <= 3.9
    recipe = Recipe.from_file(tmp_path / "out" / "recipe.json")
    ways = (recipe, *recipe.layers)
    assert {way.pattern for way in ways} == {"dense"}
    assert {"int4:auto", "int3:auto"} <= {way.values for way in ways}
    assert recipe.head == "int4"
    assert gblm("prune", tiny, "--values", "int3", "--output", "no").code == 4
    done = gblm("prune", *words[:-2], "alone", "--values", "int3", "--json")
    assert done.code == 0, done
    assert 3.1 < json.loads(done.out)["bits_per_weight"] < 3.3


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--budget", "3.5bits", "--dense-ends", 1], "which decides that itself"),
        (["--budget", "3.5bits", "--pattern", "0.5"], "which decides the sparsity"),
        (["--budget", "1bits"], "is too small"),
    ],
)
def test_budgets_that_prune_refuses(
    gblm: Run, tiny: Path, text_file: Path, words: list[object], says: str
) -> None:
    done = gblm("prune", tiny, "--calibration", text_file, *TEXT, *words, "--output", "out")
    assert (done.code, done.out) == (2, "")
    assert says in done.err


def test_an_output_in_the_way_is_refused_before_a_budget_is_spread(
    gblm: Run, tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    done = gblm("prune", tiny, "--calibration", text_file, *TEXT, "--output", "out")
    assert done.code == 4, done
    assert "exists; choose another name" in done.err
    assert "bits per weight" not in done.err
