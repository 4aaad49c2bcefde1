"""What CONTRIBUTING.md promises: an entry of a table is all that a new thing needs.

A method, a kind of value, a format and a backend are added while the program runs, and a model goes
all the way with them: pruned, packed, verified, loaded, evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gblm.checkpoint.inspect import inspect, verify
from gblm.commands.recipe_options import method_flags
from gblm.evaluate.perplexity import Protocol
from gblm.evaluate.run import Evaluation, run_evaluation
from gblm.export.dense import export_dense
from gblm.kernels import BACKENDS
from gblm.kernels.plain import Reference
from gblm.methods import METHODS, ScoredMethod, Stats
from gblm.methods.base import Method
from gblm.model.folder import ModelFolder
from gblm.packed import load
from gblm.prune import prune
from gblm.recipe import Recipe
from gblm.sparse.formats import FORMATS, Format, Parts, Shape, TensorSpec
from gblm.sparse.formats.bits import pack_bits
from gblm.sparse.formats.dense import DenseFormat
from gblm.sparse.patterns import NM, Pattern
from gblm.sparse.values import KINDS, Kind


@dataclass(frozen=True)
class Largest(ScoredMethod):
    """score = |W|^power."""

    about: ClassVar[str] = "|W|^power"

    power: float = field(default=1.0, metadata={"about": "of the absolute weight"})

    def score(self, weight: Tensor, stats: Stats) -> Tensor:
        return weight.float().abs() ** self.power


class Holes(DenseFormat):
    """Every place of a 1:8 weight with its value or zero, and a bitmask beside it."""

    name = "holes"
    own_parts = ("values", "bitmask")

    @classmethod
    def holds(cls, pattern: Pattern) -> bool:
        return pattern == NM(1, 8)

    take = Format.take

    def mask_layout(self, shape: Shape) -> dict[str, TensorSpec]:
        return {"bitmask": TensorSpec((shape[0], shape[1] // 8), torch.uint8)}

    def store(self, kept: Tensor, mask: Tensor) -> Tensor:
        whole = torch.zeros(mask.shape, dtype=kept.dtype)
        whole[mask] = kept
        return whole

    def mask_parts(self, mask: Tensor) -> dict[str, Tensor]:
        return {"bitmask": pack_bits(mask)}

    def mask(self, parts: Parts) -> Tensor:
        return Format.mask(self, parts)


class Slow(Reference):
    """Multiplies as the reference does, and counts."""

    name = "slow"
    calls = 0

    def linear(self, x: Tensor, prepared: Sequence[Tensor], fmt: Format, shape: Shape) -> Tensor:
        Slow.calls += 1
        return super().linear(x, prepared, fmt, shape)


@pytest.fixture(autouse=True)
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: list[tuple[dict[str, Any], str, Any]] = [
        (METHODS, "largest", Largest),
        (KINDS, "int6", Kind(8, 31, 32, "codes of 6 bits, a byte each")),
        (BACKENDS, "slow", Slow()),
    ]
    for table, name, entry in entries:
        monkeypatch.setitem(table, name, entry)
    # The first format that holds a pattern wins.
    before = dict(FORMATS)
    for name in before:
        monkeypatch.delitem(FORMATS, name)
    for name, entry in {"holes": Holes, **before}.items():
        monkeypatch.setitem(FORMATS, name, entry)


def test_a_model_goes_all_the_way_with_new_entries(
    tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    assert issubclass(METHODS["largest"], Method)
    recipe = Recipe(
        model=str(tiny), method="largest", options={"power": 2.0}, pattern="1:8",
        values="int6:64", calibration=None,
    )  # fmt: skip
    prune(recipe, tmp_path / "out")
    assert verify(ModelFolder.open(tmp_path / "out"))["ok"]
    (group,) = inspect(ModelFolder.open(tmp_path / "out"))["groups"]
    assert (group["format"], group["dtype"]) == ("holes", "int6:64")
    export_dense(ModelFolder.open(tmp_path / "out"), tmp_path / "dense")
    calls = Slow.calls
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        packed, dense = (
            load(tmp_path / "out", backend)(input_ids=ids).logits for backend in ("slow", "dense")
        )
    assert torch.equal(packed, dense)
    assert Slow.calls - calls == 14
    protocol = Protocol(source=str(text_file), seq_len=32, max_windows=1)
    record = run_evaluation(
        Evaluation(str(tmp_path / "out"), (protocol,), baseline=str(tiny), backend="slow")
    )
    assert record.rows[0].value is not None


@pytest.mark.parametrize("pattern", ["2:4", "0.5", "dense"])
def test_a_new_kind_of_value_goes_into_every_format_and_backend(
    pattern: str, tiny: Path, tmp_path: Path
) -> None:
    recipe = Recipe(
        model=str(tiny), method="magnitude", pattern=pattern, values="int6:64", calibration=None
    )
    prune(recipe, tmp_path / "out")
    ids = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        want = load(tmp_path / "out", "dense")(input_ids=ids).logits.float()
        got = load(tmp_path / "out", "reference")(input_ids=ids).logits.float()
        best = load(tmp_path / "out")(input_ids=ids).logits.float()
    assert torch.equal(got, want)
    assert float((best - want).norm() / want.norm()) < 0.05


def test_the_command_line_has_the_flags_of_a_new_method() -> None:
    found = {flag.name: flag for flag in method_flags()}
    assert found["power"].help == "largest: of the absolute weight (default 1.0)."
