from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gblm.errors import PatternError
from gblm.sparse import passes
from gblm.sparse.patterns import NM, Unstructured, keep_highest, parse

HALVED = NM(8, 16)


def keep_by_loop(score: torch.Tensor, keep_n: int, group_m: int) -> torch.Tensor:
    """Oracle: per group, sort by (score, index) and keep the last N."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        for start in range(0, score.shape[1], group_m):
            columns = range(start, start + group_m)
            order = sorted(columns, key=lambda c: (float(score[row, c]), c))
            mask[row, order[group_m - keep_n :]] = True
    return mask


def keep_highest_by_sort(score: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """Oracle: sort each row by (score, index) and keep the last ones."""
    mask = torch.zeros_like(score, dtype=torch.bool)
    for row in range(score.shape[0]):
        order = sorted(range(score.shape[1]), key=lambda c: (float(score[row, c]), c))
        mask[row, order[num_pruned:]] = True
    return mask


TEXTS = ["2:4", "4:8", "8:16", "1:4", "3:4", "1:3", "0.5", "0.7", "0", "0.00001", "0.1234567"]


@pytest.mark.parametrize("text", TEXTS)
def test_parse_round_trips(text: str) -> None:
    assert str(parse(text)) == text


@pytest.mark.parametrize(
    "text",
    ["4:2", "0:4", "4:4", "2:65", "1.5", "x", "", "2:4:8", "-0.5", "1", "16x16@0.5", "16@0.5",
     "0.99999999999999999999", "2:4@0.5", "unstructured"],
)  # fmt: skip
def test_parse_refuses_nonsense(text: str) -> None:
    with pytest.raises(PatternError):
        parse(text)


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


@pytest.fixture(scope="module")
def halved_masks() -> torch.Tensor:
    """[11172, 16] bool: every mask of 8 of 16 with 3 to 5 in each half."""
    places = (c for c in combinations(range(16), 8) if 3 <= sum(i < 8 for i in c) <= 5)
    index = torch.tensor(list(places))
    return torch.zeros(len(index), 16, dtype=torch.bool).scatter(1, index, True)


def best_by_trial(score: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Oracle: of all masks the one with the highest sum; score [groups, 16] float64."""
    sums = masks.double() @ score.double().t()
    return masks[sums.argmax(dim=0)]


def test_there_are_as_many_halved_masks_as_promised(halved_masks: torch.Tensor) -> None:
    assert len(halved_masks) == 11_172
    HALVED.check_mask("w", halved_masks)


@pytest.mark.parametrize("spread", ["normal", "heavy", "one half", "rising"])
def test_8_16_keeps_the_best_of_all_its_masks(spread: str, halved_masks: torch.Tensor) -> None:
    score = torch.rand(400, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    if spread == "heavy":
        score = score.pow(8)
    elif spread == "one half":
        score[::2, :8] += 1
        score[1::2, 8:] += 1
    elif spread == "rising":
        score = score.sort(dim=1).values
    mask = HALVED.keep(score.reshape(25, 256), "row").reshape(400, 16)
    assert torch.equal(mask, best_by_trial(score, halved_masks))
    plain = keep_by_loop(score, 8, 16)
    fair = (plain[:, :8].sum(1) - 4).abs() <= 1
    assert torch.equal(mask[fair], plain[fair])
    assert (~fair).any()


@settings(max_examples=40, deadline=None)
@given(levels=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_8_16_prunes_the_lowest_index_of_ties(
    halved_masks: torch.Tensor, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(levels, (20, 16), generator=generator).double()
    mask = HALVED.keep(score.reshape(4, 80), "row").reshape(20, 16)
    # Powers of two tell all sets of columns apart, and weigh less than any difference of scores.
    ordered = score + 2.0 ** torch.arange(-20, -4, dtype=torch.float64)
    assert torch.equal(mask, best_by_trial(ordered, halved_masks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_8_16_takes_infinities_and_any_dtype(dtype: torch.dtype) -> None:
    score = torch.zeros(3, 32, dtype=dtype)
    score[0, :8] = score[1, 8:16] = float("inf")
    score[2] = torch.arange(32)
    mask = HALVED.keep(score, "matrix")
    HALVED.check_mask("w", mask)
    assert mask.reshape(3, 2, 2, 8).sum(-1).tolist() == [
        [[5, 3], [3, 5]], [[3, 5], [3, 5]], [[3, 5], [3, 5]],
    ]  # fmt: skip


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7])
def test_unstructured_count_is_exact_even_when_all_scores_tie(scope: str, sparsity: float) -> None:
    mask = Unstructured(sparsity).keep(torch.ones(6, 10), scope)  # type: ignore[arg-type]
    if scope == "row":
        assert (mask.sum(1) == 10 - int(10 * sparsity)).all()
        assert not mask[:, : int(10 * sparsity)].any()
    else:
        assert mask.sum() == 60 - int(60 * sparsity)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 12),
    levels=st.integers(1, 30),
    share=st.floats(0, 1),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 10_000),
)
def test_keep_highest_drops_the_lowest_and_of_ties_the_lowest_index(
    rows: int, columns: int, levels: int, share: float, dtype: torch.dtype, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    score = torch.randint(levels, (rows, columns), generator=generator).to(dtype)
    num_pruned = int(share * columns)
    mask = keep_highest(score, num_pruned)
    assert torch.equal(mask, keep_highest_by_sort(score, num_pruned))


@pytest.mark.parametrize("num_pruned", range(5))
def test_zeros_of_both_signs_and_infinities_tie(num_pruned: int) -> None:
    zeros = torch.tensor([[0.0, -0.0, 0.0, -0.0], [-0.0, 0.0, -0.0, 0.0]])
    for score in (zeros, torch.full((2, 4), float("inf"))):
        assert keep_highest(score, num_pruned).tolist() == 2 * [[i >= num_pruned for i in range(4)]]


def test_keep_highest_of_long_rows_equals_a_stable_sort() -> None:
    score = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0)).bfloat16().float()
    for rows in (score, score.sort(dim=1).values, score.sort(dim=1, descending=True).values):
        order = rows.sort(dim=1, stable=True).indices[:, :3500]
        want = torch.ones_like(rows, dtype=torch.bool).scatter(1, order, False)
        assert torch.equal(keep_highest(rows, 3500), want)


def test_row_scope_and_matrix_scope_differ() -> None:
    score = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert Unstructured(0.5).keep(score, "matrix").tolist() == [[False, False], [True, True]]
    assert Unstructured(0.5).keep(score, "row").tolist() == [[False, True], [False, True]]


@pytest.mark.parametrize("block", [8, 64])
def test_check_mask_names_the_first_bad_group(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "BLOCK", block)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    mask[1, 4:7] = True
    with pytest.raises(PatternError, match=r"layer\.q: row 1, columns 4\.\.7 hold 3 non-zeros"):
        NM(2, 4).check_mask("layer.q", mask)


def test_check_mask_of_8_16_names_the_first_bad_half() -> None:
    mask = torch.zeros(3, 32, dtype=torch.bool)
    mask[1, 8:13] = mask[2, 24:29] = True
    HALVED.check_mask("layer.q", mask)
    mask[2, 31] = True
    message = (
        r"layer\.q: row 2, columns 24\.\.31 hold 6 non-zeros; 8:16 allows 5 in each half of a "
        r"group\. Store the mask as it is with `--pattern 0\.5`, or re-run .* --pattern 8:16`"
    )
    with pytest.raises(PatternError, match=message):
        HALVED.check_mask("layer.q", mask)
    mask[0, 4:13] = True
    with pytest.raises(
        PatternError, match=r"row 0, columns 0\.\.15 hold 9 non-zeros; 8:16 allows 8"
    ):
        HALVED.check_mask("layer.q", mask)


@pytest.mark.parametrize("narrow", [NM(2, 4), NM(4, 8), NM(2, 8), NM(1, 4)])
def test_narrower_masks_are_masks_of_8_16(narrow: NM) -> None:
    score = torch.rand(16, 64, generator=torch.Generator().manual_seed(0))
    HALVED.check_mask("w", narrow.keep(score, "row"))


def test_indivisible_sides_name_the_tensor() -> None:
    with pytest.raises(PatternError, match=r"q_proj: 10 columns .* groups of 4"):
        NM(2, 4).check_shape("q_proj", (4, 10))
