"""Every family on every road, as the table in docs/families.md says: a row of it is a test.

A model has six decoder layers, and each of them is stored in another way, so that one engine of
vLLM answers for all of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Once
from test_families import FAMILIES, save_family
from vllm_run import Question, ask, engine, farthest, is_same

from gblm import packed
from gblm.checkpoint.inspect import inspect, verify
from gblm.errors import InputError
from gblm.evaluate.perplexity import Protocol
from gblm.evaluate.run import Evaluation, run_evaluation
from gblm.export.dense import export_dense
from gblm.kernels import native
from gblm.model.folder import ModelFolder
from gblm.model.loading import load
from gblm.prune import prune
from gblm.recipe import LayerChoice, Recipe, Recovering
from gblm.recover.run import recover
from gblm.serve.launch import Server, check

pytestmark = pytest.mark.slow
WAYS = [(pattern, values) for values in ("float", "int8", "int4") for pattern in ("2:4", "0.5")]
SIZES = {"hidden_size": 128, "head_dim": 32}  # heads of a size that vLLM serves on CPU
DOCUMENT = Path(__file__).parents[2] / "docs/families.md"
ROADS = ("torch", "dense", "cpu", "head")


def table() -> dict[str, dict[str, str]]:
    """What the document says of each family: by road, "passed" or the sentence of a refusal."""
    rows = [line.strip("| ").split(" | ") for line in DOCUMENT.read_text().splitlines()
            if line.startswith("| `")]  # fmt: skip
    return {row[0].strip("`"): dict(zip(ROADS, row[-len(ROADS) :], strict=True)) for row in rows}


TABLE = table()
# Traced by torch.compile, but not turned into code, which would take 20 seconds each time.
TRACED: dict[str, Any] = {
    "enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}
}  # fmt: skip


def six_ways(family: str, folder: Path) -> None:
    """The model, packed in six ways, its head as well or not; and either as a dense one."""
    save_family(family, folder / "model", num_hidden_layers=len(WAYS), **SIZES)
    layers = tuple(
        LayerChoice(targets=(f"*.layers.{index}.*",), pattern=pattern, values=values)
        for index, (pattern, values) in enumerate(WAYS)
    )
    for head in ("int8", "float"):
        recipe = Recipe(
            model=str(folder / "model"), method="magnitude", calibration=None, layers=layers,
            head=head,
        )  # fmt: skip
        prune(recipe, folder / head)
        export_dense(ModelFolder.open(folder / head), folder / f"{head}-dense")


@pytest.fixture(scope="session")
def make(once: Once) -> Callable[[str], Path]:
    """Makes the folders of a family, once."""
    return lambda family: once(
        f"six-{re.sub('[^a-z0-9]+', '-', family)}", partial(six_ways, family)
    )


def test_the_table_has_every_family() -> None:
    assert TABLE.keys() == FAMILIES.keys()


@pytest.mark.parametrize("family", TABLE)
def test_torch(family: str, make: Callable[[str], Path], text_file: Path, tmp_path: Path) -> None:
    """Loaded, evaluated and recovered, with a packed head."""
    assert TABLE[family]["torch"] == "passed"
    made = make(family)
    ours, dense = made / "int8", made / "int8-dense"
    found = inspect(ModelFolder.open(ours))
    assert {(group["pattern"], group["dtype"].partition(":")[0]) for group in found["groups"]} == {
        (pattern, values.replace("float", "bfloat16")) for pattern, values in WAYS
    }
    assert found["head"]["dtype"].startswith("int8")
    ids = torch.arange(40).reshape(1, -1) * 5
    with torch.no_grad():
        want = load(dense)(ids).logits
        assert torch.equal(packed.load(ours, "dense")(ids).logits, want)
        kernel = packed.load(ours, "reference" if native.refusal() else "cpu")(ids).logits
    # cpu rounds activations to int8 where it meets codes.
    assert (kernel - want).norm() < 0.05 * want.norm()
    text = str(text_file)
    asked = Evaluation(str(ours), (Protocol(text, 32, 2),), baseline=str(dense), backend="dense")
    ppl = {row.side: row.value for row in run_evaluation(asked).rows if row.metric == "perplexity"}
    assert ppl["int8"] == ppl["int8-dense"] > 1
    how = Recovering(text=text, held_out=(text,), tokens=1024, seq_len=32, learning_rate=0.02)
    assert recover(ours, tmp_path / "recovered", how, made / "model")["kept"]
    verify(ModelFolder.open(tmp_path / "recovered"))
    packed.load(tmp_path / "recovered")


@pytest.mark.vllm
@pytest.mark.parametrize("half", [0, 1])
def test_vllm(half: int, make: Callable[[str], Path], best_backend: str) -> None:
    ask(*(in_vllm(row, make(family), best_backend) for family, row in [*TABLE.items()][half::2]))


def in_vllm(row: dict[str, str], made: Path, backend: str) -> Question:
    """Answers with a packed head, or without one where vLLM has no place for it."""
    assert row["dense"] == row["cpu"] == "passed"
    ours = made / ("int8" if row["head"] == "passed" else "float")
    kernels = [engine(ours, backend), engine(ours, backend, **TRACED)]
    refused = [engine(made / "int8")] if row["head"] != "passed" else []
    want, expanded, eager, traced, *others = yield [
        engine(made / f"{ours.name}-dense"), engine(ours, "dense"), *kernels, *refused
    ]  # fmt: skip
    assert is_same(expanded, want)
    assert max(farthest(eager, want), farthest(traced, want)) < 0.3
    for answer in others:
        sentence = row["head"].removeprefix("refused: ")
        assert not answer.rows
        assert sentence in answer.log
        with pytest.raises(InputError, match=re.escape(sentence)):
            check(Server(made / "int8"))
