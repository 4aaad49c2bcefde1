"""Checkpoints of compressed-tensors for tests, whole and altered.

compressed-tensors 0.9.4 itself wrote them, and 0.8.1 the one that is named after it, never gblm:
tiny seeded models, pruned by magnitude. What their weights were before it packed them lies beside
the folders, in unstructured.safetensors and 2of4.safetensors; what it unpacks codes to, under the
folder's name. Those in `served` have heads of a size that vLLM serves.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

FIXTURES = Path(__file__).parent / "legacy/fixtures"
UP = "model.layers.0.mlp.up_proj"
Tensors = dict[str, Tensor]
Change = Callable[[Tensors], object]
Settings = Callable[[dict[str, Any]], object]


def altered(
    tmp_path: Path, fixture: str, change: Change | None = None, config: Settings | None = None
) -> Path:
    """Copy a fixture, with other tensors or another quantization_config."""
    folder = Path(shutil.copytree(FIXTURES / fixture, tmp_path / "altered"))
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
        save_file(
            {n: t.clone().contiguous() for n, t in tensors.items()}, folder / "model.safetensors"
        )
    if config is not None:
        fields = json.loads((folder / "config.json").read_text())
        config(fields["quantization_config"])
        (folder / "config.json").write_text(json.dumps(fields))
    return folder


def drop(part: str) -> Change:
    """Remove a part of UP."""
    return lambda tensors: tensors.pop(f"{UP}.{part}")


def put(part: str, value: Callable[[Tensor], Tensor]) -> Change:
    """Put something else in the place of a part of UP."""
    return lambda tensors: tensors.update({f"{UP}.{part}": value(tensors[f"{UP}.{part}"])})


def each_scale(value: Callable[[Tensor], Tensor]) -> Change:
    """Change the scales of all weights."""
    return lambda tensors: tensors.update(
        {name: value(t) for name, t in tensors.items() if name.endswith("weight_scale")}
    )


def settings(**changes: object) -> Settings:
    """Say something else of the weights' codes."""
    return lambda config: config["config_groups"]["group_0"]["weights"].update(changes)
