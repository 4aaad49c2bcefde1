"""What many tests ask: do folders hold the same, does a packed model compute what it exports?"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gblm import packed
from gblm.checkpoint.inspect import verify
from gblm.export.dense import export_dense
from gblm.kernels import native
from gblm.model.folder import ModelFolder
from gblm.model.loading import load

IDS = torch.arange(40).reshape(2, 20) * 5
EXACT = ("reference", "dense")
NEEDS_KERNELS = pytest.mark.skipif(
    native.refusal() is not None, reason=f"no CPU kernels: {native.refusal()}; make dev builds them"
)


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def assert_same_tensors(one: Path, other: Path) -> None:
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def exported(folder: Path, dense: Path, backends: tuple[str, ...] = EXACT) -> torch.Tensor:
    """Export a packed folder; gives the export's logits, which are the packed model's, too."""
    export_dense(ModelFolder.open(folder), dense)
    assert verify(ModelFolder.open(folder), against=ModelFolder.open(dense))["ok"]
    want = logits(load(dense))
    for backend in backends:
        assert torch.equal(logits(packed.load(folder, backend)), want)
    return want
