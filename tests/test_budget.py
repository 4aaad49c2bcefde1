"""Budgets: read, spread over linears, answered with recipes that prune accepts, and searched."""

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
from conftest import Outcome, save_tiny_model

from gblm.budget import search as searching
from gblm.budget.allocate import family, measured, owl, uniform
from gblm.budget.amount import parse_budget
from gblm.budget.answer import Question, answer, verdict
from gblm.budget.configurations import STEPS, configurations, spending
from gblm.budget.curves import GRID, SHARE, Curve, Judgement, curve
from gblm.budget.figure import draw
from gblm.budget.linears import Linear, Spending, most_bytes
from gblm.budget.owl import owl_sparsities
from gblm.budget.rates import Rates
from gblm.budget.recipes import recipe_for
from gblm.budget.search import Search, search
from gblm.budget.sensitivity import column_costs
from gblm.budget.subject import Subject, Wanted, examine
from gblm.calibrate.gradients import Gradients, gradient_norms, output_gradients
from gblm.checkpoint.reader import Reader
from gblm.choices import FUSED, Choice, choose
from gblm.cli import cli
from gblm.data import calibration_windows, read_documents
from gblm.errors import InputError, MachineError, UsageError
from gblm.evaluate.perplexity import Protocol
from gblm.formats import format_for
from gblm.layers import Layers, StreamedLayers
from gblm.methods.obs import prepare_obs
from gblm.methods.sparsegpt import SparseGPT
from gblm.model import load, load_tokenizer, prunable
from gblm.patterns import NM, Dense, Unstructured, parse
from gblm.prune import prune
from gblm.recipe import Calibration, Recipe, Refitting
from gblm.steps import steps_of
from gblm.values import FLOAT, parse_values
from gblm.weights import SparseWeight

Run = Callable[..., Outcome]
INT4 = parse_values("int4:64")


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gblm.budget.rates.BLOCK_SECONDS", 0.0)
    monkeypatch.setattr("gblm.budget.rates.last_level_cache", lambda: 1 << 16)


@pytest.fixture(scope="module")
def base(tiny: Path, text_file: Path) -> Recipe:
    text = Calibration(source=str(text_file), num_samples=4, seq_len=32, order="sequential")
    return Recipe(
        model=str(tiny), method="sparsegpt", pattern="dense", values="int8", rounding="obs",
        calibration=text,
    )  # fmt: skip


@pytest.fixture(scope="module")
def subject(base: Recipe) -> Subject:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gblm.budget.rates.BLOCK_SECONDS", 0.0)
        patch.setattr("gblm.budget.rates.last_level_cache", lambda: 1 << 16)
        return examine(base, Wanted())


# Reading.


@pytest.mark.parametrize(
    ("text", "unit", "amount"),
    [
        ("3.5bits", "bits", 3.5),
        ("4 bits", "bits", 4),
        ("2.1GB", "bytes", 2.1e9),
        ("150MB", "bytes", 150e6),
        ("1GiB", "bytes", 2**30),
        ("12ms/token", "ms", 12),
        (".5ms", "ms", 0.5),
    ],
)
def test_budgets_are_read(text: str, unit: str, amount: float) -> None:
    budget = parse_budget(text)
    assert (budget.unit, budget.amount, str(budget)) == (unit, pytest.approx(amount), text)


@pytest.mark.parametrize(
    "text", ["", "3.5", "bits", "-1bits", "0bits", "0.0GB", "3,5bits", "1e3MB", "5s", "nanbits",
             "infGB", "3.5bits/token", "1" * 400 + "GB"],
)  # fmt: skip
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"budget .*(is unknown|above 0)"):
        parse_budget(text)


# OWL.


def test_owl_by_hand() -> None:
    """D = 1, 2, 5 %; 2λ (D − min)/(max − min) = 0, 0.04, 0.16, of mean 1/15."""
    found = owl_sparsities([0.01, 0.02, 0.05], 0.7)
    assert found == pytest.approx([0.7 + 1 / 15, 0.7 + 1 / 15 - 0.04, 0.7 + 1 / 15 - 0.16])
    assert sum(found) / 3 == pytest.approx(0.7)
    assert max(found) - min(found) == pytest.approx(0.16)


def test_owl_without_differences_is_uniform() -> None:
    assert owl_sparsities([0.02, 0.02], 0.5) == [0.5, 0.5]


# Sizes.


@pytest.mark.parametrize("spec", ["float", "int8:64", "int4:64", "uint4:64"])
@pytest.mark.parametrize("pattern", [Dense(), NM(2, 4), Unstructured(0.3), Unstructured(0.55)])
@pytest.mark.parametrize("seed", range(3))
def test_no_packed_weight_is_larger_than_foreseen(spec: str, pattern: Any, seed: int) -> None:
    values = parse_values(spec)
    torch.manual_seed(seed)
    weight = torch.randn(48, 64).bfloat16()
    # Over the whole matrix, so that rows keep odd and different counts.
    mask = pattern.keep(weight.abs().float(), "matrix")
    pruned = SparseWeight.cut(weight, mask)
    if not values.is_float:
        codes = torch.where(mask, 3, 0).to(torch.int8)
        scales = torch.ones(48, 1, dtype=torch.bfloat16)
        zeros = torch.full((48, 1), 7, dtype=torch.uint8) if values.has_zeros else None
        pruned = SparseWeight.from_codes(codes, scales, mask, torch.bfloat16, zeros)
    parts = format_for(pattern, values).pack("w", pruned)
    real = sum(part.nbytes for part in parts.values())
    bound = most_bytes(Choice(pattern, values), (48, 64), torch.bfloat16)
    assert real <= bound <= real + 24


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


@pytest.mark.parametrize("resident", [True, False])
def test_output_gradients_are_those_of_autograd(tiny: Path, resident: bool) -> None:
    model = load(tiny, torch.float32)
    samples = list(torch.randint(0, 256, (3, 12), generator=torch.Generator().manual_seed(0)))
    names = frozenset(prunable(model))
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: torch.Tensor) -> None:
            output.register_hook(seen[name].append)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    for sample in samples:
        ids = sample.reshape(1, -1)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    for handle in handles:
        handle.remove()
    how = Gradients("output", names, resident=resident)
    found: dict[str, torch.Tensor] = {}
    for _, own in output_gradients(Layers(load(tiny, torch.float32)), samples, how):
        found |= own
    assert found.keys() == names
    for name, gradients in seen.items():
        wanted = sum(gradient.square().sum(dim=(0, 1)) for gradient in gradients)
        assert torch.allclose(found[name], wanted, rtol=1e-3, atol=1e-12), name


def test_output_gradients_have_a_norm_of_their_own(tiny: Path) -> None:
    with pytest.raises(UsageError, match="norm output"):
        next(output_gradients(Layers(load(tiny)), [], Gradients("l2", frozenset())))
    norms = gradient_norms(Layers(load(tiny)), [torch.arange(8)], Gradients("l1", frozenset()))
    assert all(not own for _, own in norms)


def test_more_zeros_and_coarser_codes_are_never_better(subject: Subject) -> None:
    for own in subject.sensitivity.curves.values():
        for kind in ("float", "int8", "int4"):
            losses = own.sparse[kind]
            assert len(losses) == len(GRID)
            # Small weights may be nearer to zero than to a code: rounding is no lower bound.
            assert losses[-1] > losses[30] >= losses[0] - 1e-12 or kind == "int4"
        assert own.sparse["float"][0] == 0 < own.sparse["int8"][0] < own.sparse["int4"][0]
        assert own.fixed["2:4", "float"] > 0.9 * own.sparse["float"][50]


def test_outliers_are_counted_over_the_whole_layer(base: Recipe) -> None:
    """Against OWL's definition, with the activations' norms taken by hooks."""
    model = load(Path(base.model), torch.float32)
    subject = examine(base.model_copy(update={"dtype": "float32"}), Wanted(("float",)))
    documents = read_documents(base.calibration.source if base.calibration else "", "calibration")
    windows = calibration_windows(documents, load_tokenizer(Path(base.model)), 4, 32, 0)
    norms: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any) -> None:
            norms[name] = args[0].flatten(0, 1).norm(dim=0)

        return hook

    linears = prunable(model)
    for name, linear in linears.items():
        linear.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(input_ids=windows)
    for layer, found in enumerate(subject.sensitivity.outliers):
        scores = torch.cat([
            (linear.weight.abs() * norms[name]).flatten()
            for name, linear in linears.items() if f"layers.{layer}." in name
        ])  # fmt: skip
        wanted = float((scores > 5 * scores.mean()).float().mean())
        assert found == pytest.approx(wanted, abs=2e-4)
        assert found > 0


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
    assert found.loss(Choice(parse(text))) == pytest.approx(real, rel=0.2)


def test_a_curve_is_a_line_between_its_points() -> None:
    curve = Curve({"float": tuple(share**2 for share in GRID)}, {("2:4", "float"): 7.0})
    assert curve.loss(Choice(Dense())) == 0
    assert curve.loss(Choice(NM(2, 4))) == 7
    assert curve.loss(Choice(Unstructured(0.5))) == pytest.approx(0.25)
    assert curve.loss(Choice(Unstructured(0.505))) == pytest.approx((0.25 + 0.51**2) / 2)
    assert curve.loss(Choice(Unstructured(0.95))) == pytest.approx(0.95**2)


def test_sensitivities_are_drawn_together_and_keep_their_sum(subject: Subject) -> None:
    raw, drawn = {}, {}
    for linear in subject.linears:
        choice = subject.sparse(linear, "float", 0.5)
        raw[linear] = subject.sensitivity.curves[linear.name].loss(choice)
        drawn[linear] = subject.loss(linear, choice)
    assert sum(drawn.values()) == pytest.approx(sum(raw.values()))
    per_weight = [[own[x] / x.weights for x in subject.linears] for own in (raw, drawn)]
    spreads = [math.log(max(own) / min(own)) for own in per_weight]
    assert spreads[1] == pytest.approx(0.7 * spreads[0])
    assert sorted(raw, key=lambda x: raw[x] / x.weights) == sorted(
        drawn, key=lambda x: drawn[x] / x.weights
    )


# Allocating.


def toy(sensitive: str = "") -> tuple[list[Linear], Callable[[Linear, Choice], float]]:
    """Two decoder layers of fused linears; one of them may be a hundred times as sensitive."""
    linears = [
        Linear(f"l.{layer}.{name}", (256, 256), torch.bfloat16, layer, f"l.{layer}.{unit}")
        for layer in range(2)
        for name, unit in [
            ("q_proj", "q_proj"), ("k_proj", "q_proj"), ("v_proj", "q_proj"), ("o_proj", "o_proj"),
        ]
    ]  # fmt: skip

    def loss(linear: Linear, choice: Choice) -> float:
        factor = 100.0 if linear.name == sensitive else 1.0 + 0.1 * linear.layer
        rounding = 0.02 if choice.values.kind == "int4" else 0.0
        return factor * (choice.pattern.sparsity**3 + rounding)

    return linears, loss


def bits(linears: list[Linear], amount: float) -> Spending:
    weights = sum(linear.weights for linear in linears)
    return Spending(lambda linear, choice: linear.num_bytes(choice), amount * weights / 8)


def options(linear: Linear) -> Iterator[Choice]:
    for values in (FLOAT, INT4):
        yield Choice(Dense(), values)
        yield Choice(NM(2, 4), values)
        for sparsity in STEPS:
            yield Choice(Unstructured(sparsity), values)


def loose(linear: Linear) -> Iterator[Choice]:
    yield Choice(Dense(), INT4)
    for sparsity in STEPS:
        yield Choice(Unstructured(sparsity), INT4)


def int4(linear: Linear, sparsity: float) -> Choice:
    return Choice(Unstructured(sparsity), INT4)


@pytest.mark.parametrize("amount", [3.0, 3.3, 4.0, 4.6, 6.0, 9.5, 14.0, 17.0])
@pytest.mark.parametrize("sensitive", ["", "l.0.o_proj", "l.1.k_proj"])
def test_a_measured_allocation_uses_the_budget_up(amount: float, sensitive: str) -> None:
    linears, loss = toy(sensitive)
    limit = bits(linears, amount)
    found = measured(linears, options, limit, loss)
    assert found is not None
    total = limit.total(linears, found)
    assert total <= limit.limit
    # Whatever one linear could still gain within its family would cost more than is left.
    for linear in linears:
        for better in options(linear):
            cost = limit.cost(linear, better) - limit.cost(linear, found[linear.name])
            if family(better) == family(found[linear.name]) and total + cost <= limit.limit:
                assert loss(linear, better) >= loss(linear, found[linear.name]) - 1e-12


@pytest.mark.parametrize("amount", [3.0, 3.3, 4.0, 4.5])
def test_uniform_and_owl_are_the_densest_that_hold(amount: float) -> None:
    linears, _ = toy()
    limit = bits(linears, amount)
    even = uniform(linears, int4, limit)
    by_layer = owl(linears, int4, limit, [0.01, 0.03])
    assert even is not None
    assert by_layer is not None
    sparsities = {choice.pattern.sparsity for choice in even.values()}
    (sparsity,) = sparsities
    assert limit.holds(linears, even)
    assert not limit.holds(linears, {x.name: int4(x, sparsity - 0.001) for x in linears})
    assert limit.holds(linears, by_layer)
    first, second = (by_layer[f"l.{layer}.o_proj"].pattern.sparsity for layer in range(2))
    assert first - second == pytest.approx(0.16, abs=0.011)
    # A layer is rounded by a hundredth at most; a kept weight has four bits.
    spare = limit.limit - limit.total(linears, by_layer)
    assert spare <= 0.015 * 4 * sum(x.weights for x in linears) / 8


@pytest.mark.parametrize("sensitive", ["l.0.o_proj", "l.1.k_proj"])
@pytest.mark.parametrize("amount", [2.7, 3.4, 4.0])
def test_measured_beats_uniform_and_spares_the_sensitive(sensitive: str, amount: float) -> None:
    linears, loss = toy(sensitive)
    limit = bits(linears, amount)
    even, found = uniform(linears, int4, limit), measured(linears, loose, limit, loss)
    assert even is not None
    assert found is not None

    def total(allocation: dict[str, Choice]) -> float:
        return sum(loss(linear, allocation[linear.name]) for linear in linears)

    assert total(found) < total(even)
    plain, plain_loss = toy()
    before = measured(plain, loose, limit, plain_loss)
    assert before is not None
    (own,) = (linear for linear in linears if linear.name == sensitive)
    assert limit.cost(own, found[sensitive]) >= limit.cost(own, before[sensitive])
    assert found[sensitive].pattern.sparsity < max(c.pattern.sparsity for c in found.values())


@pytest.mark.parametrize("amount", [2.9, 3.4, 4.4, 6.5, 9.1])
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
    assert owl(linears, int4, bits(linears, 0.5), [0.1, 0.2]) is None


# Answers.


@pytest.mark.parametrize("text", ["3.4bits", "5bits", "9.5bits", "80kB", "1ms/token"])
def test_every_configuration_holds_its_budget_and_becomes_a_recipe(
    subject: Subject, base: Recipe, text: str
) -> None:
    if subject.rates is None:
        pytest.skip("no CPU kernels to measure")
    budget = parse_budget(text)
    if budget.unit == "ms":
        seconds = sum(subject.seconds(x, subject.dense(x, "int8")) for x in subject.linears)
        budget = parse_budget(f"{1e3 * (seconds + subject.rest_seconds):.6f}ms")
    limit = spending(subject, budget)
    found = configurations(subject, limit)
    names = [own.name for own in found]
    assert names[:2] == ["int8 dense", "int4 dense"]
    assert len(set(names)) == len(names)
    # Times of a tiny model are noise: there the mix may be the same as another one.
    assert "mixed measured" in names or budget.unit == "ms"
    with Reader(Path(base.model)) as reader:
        linears = prunable(StreamedLayers(reader).model)
        for own in found:
            if own.name not in names[:2]:
                assert limit.holds(subject.linears, own.allocation), own.name
            refit = base.model_copy(update={"refit": Refitting()})
            recipe = recipe_for(
                refit, subject.linears, own.allocation, subject.specs, subject.every
            )
            again = Recipe.from_dict(json.loads(json.dumps(recipe.to_dict())))
            assert choose(again, linears) == own.allocation
            steps_of(again).check(own.allocation, ranks=1)


def test_a_budget_in_bytes_is_that_of_the_folder(base: Recipe, tmp_path: Path) -> None:
    small = base.model_copy(update={"head": "int8"})
    result = answer(Question(small, parse_budget("95kB"), Wanted(("int4:auto",))))
    row = next(row for row in result["rows"] if row["fits"])
    report = prune(Recipe.from_dict(row["recipe"]), tmp_path / "out")
    assert report["bytes_packed"] <= row["bytes"] <= 95_000
    assert report["bytes_packed"] == pytest.approx(row["bytes"], rel=0.01)
    assert report["bits_per_weight"] == pytest.approx(row["bits_per_weight"], rel=0.01)


def test_the_answer_ranks_and_says_when_dense_is_better(base: Recipe) -> None:
    result = answer(Question(base, parse_budget("8.6bits")))
    json.dumps(result)
    fits = [row for row in result["rows"] if row["fits"]]
    assert [row["rank"] for row in result["rows"]] == [*range(1, len(result["rows"]) + 1)]
    assert [row["loss"] for row in fits] == sorted(row["loss"] for row in fits)
    assert all(row["ratio"] == pytest.approx(math.exp(row["loss"]), rel=1e-4) for row in fits)
    assert "is the better answer at 8.6bits" in result["verdict"]
    assert {"int8 dense", "int4 dense"} <= {row["name"] for row in fits}
    narrow = answer(Question(base, parse_budget("3.3bits"), Wanted(("int4:auto",), ("2:4",))))
    assert not {row["name"] for row in narrow["rows"]} & {"int4 uniform", "int8 dense"}
    assert "no dense model holds 3.3bits; int4 dense" in narrow["verdict"]


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
    assert "int4 dense (4.20 bits, 1.100x the perplexity) needs more" in none


def test_what_cannot_be_is_said(base: Recipe, subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"too small: nine zeros of ten still take about \d"):
        answer(Question(base, parse_budget("0.3bits")))
    with pytest.raises(UsageError, match="needs calibration text"):
        answer(Question(base.model_copy(update={"calibration": None}), parse_budget("4bits")))
    blind = replace(subject, rates=None, notes=("no decode times: x",))
    with pytest.raises(MachineError, match="no decode times: x"):
        spending(blind, parse_budget("3ms"))
    odd = save_tiny_model(tmp_path / "odd", intermediate_size=88)
    found = examine(base.model_copy(update={"model": str(odd)}), Wanted())
    assert set(found.specs) == {"float"}
    assert any("int4:auto is left out" in note and "88 columns" in note for note in found.notes)


def test_times_of_masks_lie_between_those_measured() -> None:
    per_weight = {("bitmask/0.3", "int4"): 3.0, ("bitmask/0.5", "int4"): 2.0,
                  ("bitmask/0.7", "int4"): 1.5, ("torch", "float"): 9.0}  # fmt: skip
    rates = Rates(10.0, per_weight, 1)
    assert rates.seconds(2, Choice(Unstructured(0.5), INT4)) == pytest.approx(14)
    assert rates.seconds(2, Choice(Unstructured(0.4), INT4)) == pytest.approx(15)
    assert rates.seconds(2, Choice(Unstructured(0.8), INT4)) == pytest.approx(12.5)
    assert rates.seconds(2, None) == 28


# The command line.


def test_plan_writes_a_recipe_that_prune_takes(
    gblm: Run, tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    text = ["--calibration", text_file, "--num-samples", 2, "--seq-len", 16]
    done = gblm("plan", tiny, "--budget", "3.6bits", "--write", "recipe.json", *text)
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
    done = gblm("plan", "--recipe", "recipe.json", "--budget", "9.5bits", "--json", "--write",
                "second.json", "--pick", 2)  # fmt: skip
    assert done.code == 0, done
    rows = json.loads(done.out)["rows"]
    assert json.loads((tmp_path / "second.json").read_text()) == rows[1]["recipe"]
    done = gblm("plan", tiny, "--budget", "9.5bits", "--method", "wanda", "--pattern", "2:4",
                "--values", "float", "--json", *text)  # fmt: skip
    assert done.code == 0, done
    rows = json.loads(done.out)["rows"]
    assert {row["recipe"]["method"] for row in rows} == {"wanda"}
    assert {group["values"] for row in rows for group in row["groups"]} == {"float"}
    assert {group["pattern"] for row in rows for group in row["groups"]} <= {"2:4", "dense"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--budget", "3.5"], "budget '3.5' is unknown"),
        (["--budget", "3bits", "--pattern", "0.5"], "which decides the sparsity"),
        (["--budget", "3bits", "--sparsity", "0.5"], "--sparsity does not go with"),
        (["--budget", "3bits", "--stats", "s"], "--stats does not go with"),
        (["--write", "r.json"], "go with --budget"),
        (["--budget", "3bits", "--ranks", "2"], "--ranks does not go with"),
        (["--budget", "3bits", "--method", "wunda"], "choose from magnitude"),
        (["--budget", "3bits", "--write", "r.json", "--pick", "99"], "has the rows 1 to"),
    ],
)
def test_mistakes(tiny: Path, text_file: Path, words: list[str], sentence: str) -> None:
    text = [] if "--stats" in words else ["--calibration", str(text_file), "--seq-len", "16"]
    with pytest.raises((click.UsageError, UsageError), match=sentence):
        cli.main(["plan", str(tiny), *words, *text], standalone_mode=False, obj={})


# Searching.


@pytest.fixture
def wanted(base: Recipe, text_file: Path, tmp_path: Path) -> Search:
    question = Question(base, parse_budget("3.5bits"), Wanted(("int4:auto",)))
    return Search(question, tmp_path / "found", 2, Protocol(str(text_file), 32, 2))


def test_a_search_measures_and_goes_on(wanted: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    real = searching.prune

    def counted(recipe: Recipe, output: Any, progress: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(output.folder.name)
        return real(recipe, output, progress)

    monkeypatch.setattr(searching, "prune", counted)
    with pytest.raises(KeyboardInterrupt):
        search(wanted)
    assert len(made) == 2
    monkeypatch.setattr(searching, "answer", None)  # the plan is not made again
    made[:] = [made[0]]
    result = search(wanted)
    assert len(made) == 2
    rows = result["candidates"]
    assert len(rows) == 3
    measured_ones = [row["measured"]["perplexity"] for row in rows]
    assert measured_ones == sorted(measured_ones)
    assert "int4 dense" in {row["name"] for row in rows if not row["fits"]}
    assert all(row["measured"]["bits_per_weight"] <= 3.5 for row in rows if row["fits"])
    assert any(row["on_frontier"] for row in rows)
    folders = sorted(path.name for path in wanted.folder.iterdir() if path.is_dir())
    assert folders == [Path(result["best"]["folder"]).name]
    assert (Path(result["best"]["folder"]) / "model.safetensors").exists()
    # Nothing is left to do.
    monkeypatch.setattr(searching, "prune", None)
    monkeypatch.setattr(searching, "run_evaluation", None)
    assert search(wanted)["best"] == result["best"]


def test_a_finished_folder_is_not_made_again(
    wanted: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*args: Any, **kwargs: Any) -> Any:
        if (wanted.folder / "search.json").exists() and any(wanted.folder.glob("*/recipe.json")):
            raise KeyboardInterrupt
        return {"perplexity": 300.0, "protocol": "p", "tokens_sha256": "t"}

    monkeypatch.setattr(searching, "run_evaluation", cut_off)
    with pytest.raises(KeyboardInterrupt):
        search(wanted)
    (folder,) = (path.parent for path in wanted.folder.glob("*/recipe.json"))
    before = (folder / "MANIFEST.json").stat().st_mtime_ns
    monkeypatch.undo()
    result = search(replace(wanted, keep_all=True))
    assert (folder / "MANIFEST.json").stat().st_mtime_ns == before
    assert len([path for path in wanted.folder.iterdir() if path.is_dir()]) == 3
    assert result["baseline"]["perplexity"] == 300.0


def test_another_search_is_refused(wanted: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(searching, "run_evaluation", measure)
    with pytest.raises(KeyboardInterrupt):
        search(wanted)
    other = Question(wanted.question.recipe, parse_budget("4bits"), wanted.question.wanted)
    with pytest.raises(InputError, match=r"of another search .budget differ"):
        search(replace(wanted, question=other))
    (wanted.folder / "search.json").unlink()
    (wanted.folder / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty, and no search"):
        search(wanted)


@pytest.mark.parametrize("values", ["int4", "uint4"])
def test_search_on_the_command_line(
    gblm: Run, tiny: Path, text_file: Path, tmp_path: Path, values: str
) -> None:
    done = gblm(
        "search", tiny, "--budget", "3.5bits", "--values", values, "--output", "found", "--limit",
        1, "--text", text_file, "--eval-seq-len", 32, "--max-windows", 1, "--calibration",
        text_file, "--num-samples", 2, "--seq-len", 16,
    )  # fmt: skip
    assert done.code == 0, done
    assert "unpruned" in done.out
    assert "best within 3.5bits: found/" in done.out
    state = json.loads((tmp_path / "found/search.json").read_text())
    assert state["command"].startswith(f"gblm search {tiny.name} --budget 3.5bits")
    assert ("picture: found/search.svg" in done.out) == (tmp_path / "found/search.svg").exists()


def test_the_picture_names_every_candidate(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"name": name, "dense": dense, "ratio": 1.5, "on_frontier": True,
         "measured": {"bits_per_weight": bits, "perplexity": 20.0 - bits}}
        for name, dense, bits in [("int4 measured", False, 3.1), ("int4 dense", True, 4.2)]
    ]  # fmt: skip
    baseline = {"perplexity": 13.0, "protocol": "some text"}
    assert draw({"candidates": rows, "baseline": baseline, "budget": "3bits"}, tmp_path / "x.svg")
    assert "<svg" in (tmp_path / "x.svg").read_text()
