from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm.errors import PatternError
from gblm.patterns import NM, Unstructured, parse


def keep_by_loop(score: torch.Tensor, keep_n: int, group_m: int) -> torch.Tensor:
    """Oracle: per group, sort by (score, index) and keep the last N."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        for start in range(0, score.shape[1], group_m):
            columns = range(start, start + group_m)
            order = sorted(columns, key=lambda c: (float(score[row, c]), c))
            mask[row, order[group_m - keep_n :]] = True
    return mask


@pytest.mark.parametrize(
    "text", ["2:4", "4:8", "1:4", "3:4", "1:3", "0.5", "0.7", "0", "0.00001", "0.1234567"]
)
def test_parse_round_trips(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text", ["4:2", "0:4", "4:4", "2:65", "1.5", "x", "", "2:4:8", "-0.5", "1"]
)
def test_parse_refuses_nonsense(text: str) -> None:
    with pytest.raises(PatternError):
        parse(text)


def test_parse_refuses_a_contradicting_sparsity() -> None:
    assert parse("unstructured", 0.6) == Unstructured(0.6)
    with pytest.raises(PatternError, match="leave --sparsity out"):
        parse("2:4", 0.7)


@settings(max_examples=40, deadline=None)
@given(
    pattern=st.sampled_from([(2, 4), (4, 8), (1, 4), (3, 4), (1, 3), (5, 7)]),
    rows=st.integers(1, 5),
    groups=st.integers(1, 5),
    levels=st.integers(1, 6),
    seed=st.integers(0, 10_000),
)
def test_nm_keeps_exactly_n_and_prunes_the_lowest_index_of_ties(
    pattern: tuple[int, int], rows: int, groups: int, levels: int, seed: int
) -> None:
    keep_n, group_m = pattern
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(levels, (rows, groups * group_m), generator=generator).float()
    mask = NM(keep_n, group_m).keep(score, "row")
    assert torch.equal(mask, keep_by_loop(score, keep_n, group_m))


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7])
def test_unstructured_count_is_exact_even_when_all_scores_tie(scope: str, sparsity: float) -> None:
    mask = Unstructured(sparsity).keep(torch.ones(6, 10), scope)  # type: ignore[arg-type]
    if scope == "row":
        assert (mask.sum(1) == 10 - int(10 * sparsity)).all()
        assert not mask[:, : int(10 * sparsity)].any()
    else:
        assert mask.sum() == 60 - int(60 * sparsity)


def test_row_scope_and_matrix_scope_differ() -> None:
    score = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert Unstructured(0.5).keep(score, "matrix").tolist() == [[False, False], [True, True]]
    assert Unstructured(0.5).keep(score, "row").tolist() == [[False, True], [False, True]]


def test_check_mask_names_the_first_bad_group() -> None:
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[1, 4:7] = True
    with pytest.raises(PatternError, match=r"layer\.q: row 1, columns 4\.\.7 hold 3 non-zeros"):
        NM(2, 4).check_mask("layer.q", mask)


def test_indivisible_columns_name_the_tensor() -> None:
    with pytest.raises(PatternError, match=r"q_proj: 10 columns .* groups of 4"):
        NM(2, 4).check_shape("q_proj", (4, 10))
