"""Checkpoints of compressed-tensors for tests, whole and altered.

compressed-tensors 0.9.4 itself wrote them, and 0.8.1 the one that is named after it, never gblm:
tiny seeded models, pruned by magnitude. What their weights were before it packed them lies beside
the folders, in unstructured.safetensors and 2of4.safetensors; what it unpacks codes to, under the
folder's name. Those in `served` have heads of a size that vLLM serves.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Pack = Callable[..., Path]


Tensors = dict[str, Tensor]


FIXTURES = Path(__file__).parent / "legacy/fixtures"


# Fixture → the weights before the old library packed them, and the pattern we store.
TRUTH = {
    "bitmask": ("unstructured", "bitmask"),
    "bitmask-0.8": ("unstructured", "bitmask"),
    "24-bitmask": ("2of4", "nm"),
    "dense": ("2of4", "nm"),
}


UP = "model.layers.0.mlp.up_proj"


def truth(fixture: str) -> Tensors:
    return load_file(FIXTURES / f"{TRUTH[fixture][0]}.safetensors")


def same_bits(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and a[n].flatten().view(torch.uint8).equal(b[n].flatten().view(torch.uint8))
        for n in a
    )


def altered(
    tmp_path: Path,
    fixture: str,
    change: Callable[[Tensors], object] | None = None,
    config: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """A copy of a fixture with other tensors or another quantization_config."""
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


def drop(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{UP}.{part}")


def put(part: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{UP}.{part}": value(tensors[f"{UP}.{part}"])})


def settings(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["config_groups"]["group_0"]["weights"].update(changes)


def scale(value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return put("weight_scale", value)


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()
