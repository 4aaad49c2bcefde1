"""Decoder layers one at a time: read from the checkpoint when opened, dropped when closed.

Pruning never holds the model.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gblm.errors import CheckpointError
from gblm.model.folder import ModelFolder
from gblm.model.linears import decoder_layers, linears, prunable, towers
from gblm.model.loading import check_device, check_shapes, fast_dtype, skeleton
from gblm.model.reader import Reader
from gblm.sparse.passes import all_finite

logger = logging.getLogger(__name__)

META = torch.device("meta")


class Layers:
    """The decoder layers of a model are read from safetensors when opened, dropped when closed.

    Attributes:
        model: a causal language model in eval mode, without weights but for what was loaded.
        reader: of the checkpoint.
        prefix: name of the list of decoder layers, such as "model.layers".
        modules: the decoder layers.
        device: where layers compute.
        dtype: of the weights in memory.
    """

    def __init__(
        self, reader: Reader, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> None:
        """Build the model without weights and hold it against the checkpoint's headers.

        Args:
            reader: the open checkpoint; it must outlive this object.
            dtype: of the computation; None takes what `fast_dtype` makes of the first linear's.
            device: where layers compute.

        Raises:
            CheckpointError: a weight is missing or has another shape.
        """
        self.reader, self.device = reader, check_device(device)
        weightless = check_shapes(reader)
        prunable(weightless)  # says first if the architecture is one that cannot be pruned
        _check_complete(reader, weightless)
        model = skeleton(reader.folder, len(reader.headers), buffers=True)
        self.model: Any = model.eval().requires_grad_(False)
        self.prefix, self.modules = decoder_layers(model)
        first = next(iter(linears(self.modules[0])))
        stored = reader.headers[f"{self.name(0)}.{first}.weight"][1]
        self.dtype = dtype or fast_dtype(stored, self.device)
        for buffer_owner in self.model.modules():
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                setattr(buffer_owner, name, buffer.to(self.device))

    def __len__(self) -> int:
        return len(self.modules)

    def name(self, index: int) -> str:
        """Return the full name of a decoder layer."""
        return f"{self.prefix}.{index}"

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        """Give a decoder layer with its weights on the device; they are dropped afterwards."""
        layer = self.modules[index]
        for name in layer.state_dict():
            _assign(layer, name, self._read(f"{self.name(index)}.{name}").to(self.device))
        self.reader.release()
        try:
            yield layer
        finally:
            for name, parameter in list(layer.named_parameters()):
                _assign(layer, name, torch.empty_like(parameter, device=META))

    def load_frame(self, head: bool) -> None:
        """Read embeddings and norms, and with `head` the output head."""
        self._drop_outside()
        wanted = self.model if head else self.model.base_model
        # Llama 4's text model has no such part.
        outer = "" if wanted is self.model else f"{self.model.base_model_prefix}."
        for local in wanted.state_dict():
            name = outer + local
            if not name.startswith(self.prefix + ".") and name in self.reader:
                _assign(self.model, name, self._read(name).to(self.device))
        if head:
            # As when transformers loads it: a head that is stored is not the embeddings.
            self.model.tie_weights({n for n in self.model.state_dict() if n not in self.reader})

    def in_float32(self) -> Layers:
        """Return the same model, computing in float32; it reads the same open checkpoint."""
        return Layers(self.reader, torch.float32, self.device)

    def _drop_outside(self) -> None:
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if not name.startswith(self.prefix + "."):
                _assign(self.model, name, torch.empty_like(parameter, device=META))

    def _read(self, name: str) -> Tensor:
        tensor = self.reader.tensor(name)
        if not all_finite(tensor):
            raise CheckpointError(f"{name} holds NaN or Inf: the checkpoint is damaged.")
        # clone(): a tensor of the file's mapping would be changed in place by pruning.
        converted = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return converted.clone() if converted is tensor else converted


@contextmanager
def stream(
    folder: ModelFolder, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Iterator[Layers]:
    """Open a dense model for streaming; see Layers.

    Raises:
        InputError: the weights are packed or quantised.
        CheckpointError: a weight is missing or has another shape.
    """
    folder.check_dense()
    with Reader(folder) as reader:
        layers = Layers(reader, dtype, device)
        if beside := towers(layers.model):
            logger.info("only the text decoder is pruned: %s stay dense", " and ".join(beside))
        yield layers


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Put a tensor in the place of a parameter or buffer, whatever its device was."""
    owner_name, _, local = name.rpartition(".")
    owner: Any = module.get_submodule(owner_name)
    if local in owner._parameters:
        owner._parameters[local] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[local] = tensor


def _check_complete(reader: Reader, model: Any) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    for name in model.state_dict():
        if name not in reader and name not in tied:
            raise CheckpointError(f"{reader.folder}: tensor {name} is missing.")
