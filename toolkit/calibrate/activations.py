"""Activations: one tensor per calibration batch, in CPU memory or, when there are many, on disk."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch
from safetensors import safe_open
from torch import Tensor

from gblm.files import write_scratch
from gblm.model.layers import Layers
from gblm.model.linears import hidden_size

# The rest is for the layer, its statistics and the method.
MEMORY_SHARE = 0.25


class Activations:
    """A list of tensors that may lie on disk."""

    def __init__(self, folder: Path | None = None) -> None:
        """Keep tensors in memory, or with `folder` as one safetensors file each."""
        self._folder = folder
        self._tensors: list[Tensor] = []
        self._count = 0
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def append(self, tensor: Tensor) -> None:
        """Add one at the end."""
        self._count += 1
        if self._folder is None:
            self._tensors.append(tensor.cpu())
        else:
            self[self._count - 1] = tensor

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        if self._folder is None:
            self._tensors[index] = tensor.cpu()
        else:
            write_scratch(self._file(index), {"x": tensor.detach().cpu().contiguous()})

    def get(self, index: int, device: torch.device) -> Tensor:
        """Give the tensor on a device; in-place changes to it are not kept."""
        if self._folder is None:
            return self._tensors[index].to(device)
        with safe_open(self._file(index), framework="pt") as file:
            tensor: Tensor = file.get_tensor("x")
            return tensor.to(device) if device.type != "cpu" else tensor.clone()

    def sample(self, index: int, row: int, device: torch.device) -> Tensor:
        """Give one row of a tensor on a device, [1, ...]; the others are not read or moved."""
        if self._folder is None:
            return self._tensors[index][row : row + 1].to(device)
        with safe_open(self._file(index), framework="pt") as file:
            tensor: Tensor = file.get_slice("x")[row : row + 1]
            return tensor.to(device)

    def clear(self) -> None:
        """Forget all of them."""
        for index in range(self._count if self._folder is not None else 0):
            self._file(index).unlink(missing_ok=True)
        self._tensors.clear()
        self._count = 0

    def _file(self, index: int) -> Path:
        if self._folder is None:
            raise RuntimeError("these activations are in memory.")
        return self._folder / f"{index:05d}.safetensors"


def fits(num_bytes: int, device: torch.device) -> bool:
    """Tell whether a device's memory may hold so many bytes for the length of a run."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        # Ranks on one machine share its memory.
        free = psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return num_bytes <= MEMORY_SHARE * free


def stream_bytes(layers: Layers, batches: Iterable[Tensor]) -> int:
    """Count the bytes of all samples at the input of one decoder layer."""
    tokens = sum(batch.numel() for batch in batches)
    return tokens * hidden_size(layers.model) * layers.dtype.itemsize


def place(folder: Path | None, num_bytes: int) -> Path | None:
    """Say where activations of this size go: None for memory, else the folder."""
    return None if fits(num_bytes, torch.device("cpu")) else folder
