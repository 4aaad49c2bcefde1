"""Every family on every road, as the table in docs/families.md says: a row of it is a test.

A model has six decoder layers, and each of them is stored in another way, so that one engine of
vLLM answers for all of them. All engines start in one process.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import Once
from test_families import FAMILIES, save_family
from vllm_run import Answer, Question, ask, engine, farthest, is_same

from gblm import packed
from gblm.checkpoint.inspect import inspect
from gblm.export.dense import export_dense
from gblm.kernels import native
from gblm.model.folder import ModelFolder
from gblm.model.loading import load
from gblm.prune import prune
from gblm.recipe import LayerChoice, Recipe

pytestmark = pytest.mark.slow
WAYS = [(pattern, values) for values in ("float", "int8", "int4") for pattern in ("2:4", "0.5")]
SIZES = {"hidden_size": 128, "head_dim": 32}  # heads of a size that vLLM serves on CPU
DOCUMENT = Path(__file__).parents[2] / "docs/families.md"
ROADS = ("packed.load", "dense", "cpu")


def table() -> dict[str, dict[str, str]]:
    """What the document says of each family: by road, "passed" or the sentence of a refusal."""
    rows = [line.strip("| ").split(" | ") for line in DOCUMENT.read_text().splitlines()
            if line.startswith("| `")]  # fmt: skip
    return {row[0].strip("`"): dict(zip(ROADS, row[-len(ROADS) :], strict=True)) for row in rows}


TABLE = table()


def six_ways(family: str, folder: Path) -> None:
    """The model, packed in six ways, and what it is as a dense one."""
    save_family(family, folder / "model", num_hidden_layers=len(WAYS), **SIZES)
    layers = tuple(
        LayerChoice(targets=(f"*.layers.{index}.*",), pattern=pattern, values=values)
        for index, (pattern, values) in enumerate(WAYS)
    )
    recipe = Recipe(
        model=str(folder / "model"), method="magnitude", calibration=None, layers=layers
    )
    prune(recipe, folder / "packed")
    export_dense(ModelFolder.open(folder / "packed"), folder / "dense")


def folders(family: str, once: Once) -> tuple[Path, Path]:
    """The packed folder and the dense one."""
    made = once(f"six-{re.sub('[^a-z0-9]+', '-', family)}", partial(six_ways, family))
    return made / "packed", made / "dense"


def test_the_table_has_every_family() -> None:
    assert TABLE.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", TABLE)
def test_transformers(family: str, once: Once) -> None:
    assert TABLE[family]["packed.load"] == "passed"
    ours, dense = folders(family, once)
    groups = inspect(ModelFolder.open(ours))["groups"]
    assert {(group["pattern"], group["dtype"].partition(":")[0]) for group in groups} == {
        (pattern, values.replace("float", "bfloat16")) for pattern, values in WAYS
    }
    ids = torch.arange(40).reshape(1, -1) * 5
    with torch.no_grad():
        want = load(dense)(ids).logits
        assert torch.equal(packed.load(ours, "dense")(ids).logits, want)
        kernel = packed.load(ours, "reference" if native.refusal() else "cpu")(ids).logits
    # cpu rounds activations to int8 where it meets codes.
    assert (kernel - want).norm() < 0.05 * want.norm()


@pytest.mark.vllm
def test_vllm(once: Once, best_backend: str) -> None:
    ask(*(in_vllm(row, *folders(family, once), best_backend) for family, row in TABLE.items()))


def in_vllm(row: dict[str, str], ours: Path, dense: Path, backend: str) -> Question:
    want, expanded, kernel = yield [engine(dense), engine(ours, "dense"), engine(ours, backend)]
    check(row["dense"], expanded, lambda: is_same(expanded, want))
    check(row["cpu"], kernel, lambda: farthest(kernel, want) < 0.3)


def check(cell: str, got: Answer, passes: Callable[[], bool]) -> None:
    """Hold what happened against a cell of the table."""
    if cell == "passed":
        assert passes(), got.log
    else:
        assert not got.rows
        assert cell.removeprefix("refused: ") in got.log
