"""What every method promises, over METHODS × patterns."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from correlated import problem
from pairs import pairwise

from gblm.errors import UsageError
from gblm.methods import METHODS, ScoredMethod, flags, make_method
from gblm.methods.pipeline import make_pipeline
from gblm.sparse.patterns import NM, Pattern, parse
from gblm.sparse.values import Rounding, parse_values
from gblm.sparse.weights import SparseWeight

PATTERNS = ["0.5", "0.7", "2:4", "4:8", "8:16", "1:4"]
OPTIONS = [(name, f.name) for name, m in METHODS.items() for f in dataclasses.fields(m)]


@pytest.fixture
def stats() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(64, 32, generator=generator)
    return {
        "act_norm": torch.rand(32, generator=generator) + 0.1,
        "hessian": tokens.t() @ tokens,
        "grad_norm": torch.rand(24, 32, generator=generator) * 1e-3,
        "num_samples": torch.tensor(4.0),
    }


def num_kept(name: str, pattern: Pattern) -> int:
    """Who competes decides where the count is rounded: each row, or all."""
    if isinstance(pattern, NM):
        return 24 * 32 * pattern.keep_n // pattern.group_m
    if name in ("magnitude", "sparsegpt", "alps"):
        return 24 * 32 - int(24 * 32 * pattern.sparsity)
    return 24 * (32 - int(32 * pattern.sparsity))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", METHODS)
def test_prune_keeps_exact_count_and_untouched_values(
    name: str, pattern: str, stats: dict[str, torch.Tensor]
) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in stats.items()} | {"": weight.clone()}
    rule, method = parse(pattern), make_method(name, {})
    pruned = method.prune(weight, method.prepare(stats), rule)
    rule.check_mask(name, pruned.mask)
    assert int(pruned.mask.sum()) == num_kept(name, rule)
    assert not pruned.weight[~pruned.mask].any()
    if isinstance(method, ScoredMethod):
        assert torch.equal(pruned.weight[pruned.mask], weight[pruned.mask])
    given = stats | {"": weight}
    assert all(torch.equal(given[name], before[name]) for name in given)


@pytest.mark.parametrize(
    ("name", "rounding", "refit", "values"),
    pairwise(list(METHODS), ["nearest", "obs"], [None, {}], ["float", "int8:32", "int4:row"]),
)
def test_all_steps_keep_the_halves_of_8_16(
    name: str,
    rounding: Rounding,
    refit: dict[str, int] | None,
    values: str,
    stats: dict[str, torch.Tensor],
) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    weight[:, :8] *= 4  # what is chosen freely would come from the first half
    rule, pipeline = parse("8:16"), make_pipeline(name, {}, refit, rounding)
    kind = parse_values(values)
    pruned = pipeline.prune(weight, pipeline.prepare(stats), rule, kind)
    rule.check_mask(name, pruned.mask)
    assert (pruned.mask.reshape(24, 2, 16).sum(-1) == 8).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_computed_in_float32(
    name: str, dtype: torch.dtype, stats: dict[str, torch.Tensor]
) -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    method, rule = make_method(name, {}), parse("2:4")
    half, full = (method.prune(w, method.prepare(stats), rule) for w in (weight, weight.float()))
    assert (half.weight.dtype, half.mask.dtype) == (dtype, torch.bool)
    assert half.weight.is_contiguous()
    assert half.mask.is_contiguous()
    assert torch.equal(half.mask, full.mask)
    assert torch.equal(half.weight, full.weight.to(dtype))


UPDATING = [name for name, method in METHODS.items() if "hessian" in method.needs]


def with_hessian(name: str, hessian: torch.Tensor, pattern: str) -> SparseWeight:
    weight, method = problem(24, 32)[0], make_method(name, {})
    return method.prune(weight, method.prepare({"hessian": hessian}), parse(pattern))


@pytest.mark.parametrize("name", UPDATING)
def test_scale_of_the_hessian_makes_no_difference(name: str) -> None:
    _, hessian = problem(24, 32)
    one, other = (with_hessian(name, h, "2:4") for h in (hessian, hessian * 2**20))
    assert torch.equal(one.mask, other.mask)
    torch.testing.assert_close(one.weight, other.weight)


@pytest.mark.parametrize("pattern", ["0.5", "2:4"])
@pytest.mark.parametrize("name", UPDATING)
def test_inputs_that_are_always_zero_go_first(name: str, pattern: str) -> None:
    dead = [1, 2, 5, 31]
    _, hessian = problem(24, 32)
    hessian[dead], hessian[:, dead] = 0, 0
    pruned = with_hessian(name, hessian, pattern)
    assert not pruned.mask[:, dead].any()
    assert int(pruned.mask.sum()) == 24 * 16
    # Those beyond the budget are kept as zeros; all scores tie, so the lowest index goes first.
    pruned = with_hessian(name, torch.zeros(32, 32), "2:4")
    assert pruned.mask.tolist() == [[False, False, True, True] * 8] * 24
    assert not pruned.weight.any()


def test_magnitude_score_is_the_absolute_weight(stats: dict[str, torch.Tensor]) -> None:
    weight = torch.randn(24, 32)
    assert torch.equal(make_method("magnitude", {}).score(weight, stats), weight.abs())


def test_wanda_score_follows_the_formula(stats: dict[str, torch.Tensor]) -> None:
    weight = torch.randn(24, 32)
    score = make_method("wanda", {}).score(weight, stats)
    for i in range(24):
        for j in range(32):
            assert score[i, j] == weight[i, j].abs() * stats["act_norm"][j]


def documented(name: str) -> str:
    """A line of the table in docs/methods.md."""
    needs = METHODS[name].needs
    reads = "no" if not needs else "forward and backward" if "grad_norm" in needs else "forward"
    return f"| `{name}` | {METHODS[name].about} | {reads} |".replace("|W|", "\\|W\\|")


def test_the_docs_list_every_method() -> None:
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    table = "".join(f"{documented(name)}\n" for name in METHODS)
    assert table in text, table


def test_flags_say_which_methods_take_them() -> None:
    found = {flag.name: flag for flag in flags()}
    assert found["damping"].help.startswith("alps, sparsegpt: ")
    assert (found["alpha"].kind, found["alpha"].help[-16:]) == (float, "(default 100.0).")
    assert "block_size" not in found


def test_unknown_method_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match=f"'wunda' is unknown: choose from {', '.join(METHODS)}"):
        make_method("wunda", {})


def test_unknown_option_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="takes alpha, gradient_norm, gradient_mode"):
        make_method("gblm", {"beta": 1})
    with pytest.raises(UsageError, match="takes no options"):
        make_method("magnitude", {"alpha": 1.0})


@pytest.mark.parametrize(("name", "option"), OPTIONS)
def test_options_of_the_wrong_type_are_refused(name: str, option: str) -> None:
    for value in ("x", None, [1], {}):
        with pytest.raises(UsageError, match=f"method {name}: option {option} is"):
            make_method(name, {option: value})


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gblm", {"gradient_norm": "l3"}),
        ("gblm", {"gradient_mode": "sum"}),
        ("gblm", {"alpha": -1.0}),
        ("gblm", {"alpha": float("nan")}),
        ("gblm", {"alpha": True}),
        ("sparsegpt", {"damping": 0.0}),
        ("sparsegpt", {"damping": 1.5}),
        ("sparsegpt", {"block_size": 0}),
        ("sparsegpt", {"block_size": 128.0}),
        ("alps", {"damping": 0.0}),
        ("alps", {"max_iterations": 0}),
    ],
)
def test_impossible_options_are_refused(name: str, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        make_method(name, options)


def test_a_whole_number_will_do_for_a_fraction() -> None:
    assert make_method("gblm", {"alpha": 100}) == make_method("gblm", {})
