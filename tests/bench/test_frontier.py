from __future__ import annotations

import re
from pathlib import Path

import frontier
import frontier_cases
import pytest
import torch
from frontier_cases import CASES

from gblm.methods.pipeline import make_pipeline
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader


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
