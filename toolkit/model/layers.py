"""Decoder layers one at a time: read from the checkpoint when opened, dropped when closed.

Pruning never holds the model. A resident model offers the same interface, so the walk over decoder
layers and the gradients are written once.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gblm.errors import CheckpointError
from gblm.model.folder import ModelFolder
from gblm.model.linears import decoder_layers, linears, prunable, towers
from gblm.model.loading import check_device, names_in_memory, skeleton
from gblm.model.reader import Reader

logger = logging.getLogger(__name__)

META = torch.device("meta")


class Layers:
    """A model whose decoder layers are all in memory.

    Attributes:
        model: a causal language model in eval mode.
        prefix: name of the list of decoder layers, such as "model.layers".
        device: where layers compute.
        dtype: of the weights in memory.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.prefix, self.modules = decoder_layers(model)
        self.device = next(model.parameters()).device
        self.dtype = next(self.modules.parameters()).dtype

    def __len__(self) -> int:
        return len(self.modules)

    def name(self, index: int) -> str:
        """Return the full name of a decoder layer."""
        return f"{self.prefix}.{index}"

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        """Give a decoder layer with its weights on the device."""
        yield self.modules[index]

    def load_frame(self, head: bool) -> None:
        """Load everything outside the decoder layers; the output head only with `head`."""

    def in_float32(self) -> Layers:
        """Return the same model, computing in float32."""
        return Layers(copy.deepcopy(self.model).float())


class StreamedLayers(Layers):
    """Decoder layers read from safetensors when opened and dropped when closed.

    On a GPU the layer that follows is read ahead while this one computes.
    """

    def __init__(
        self, reader: Reader, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
    ) -> None:
        """Build the model without weights and hold it against the checkpoint's headers.

        Args:
            reader: the open checkpoint; it must outlive this object.
            dtype: of the computation; None takes that of the first linear in the checkpoint.
            device: where layers compute.

        Raises:
            CheckpointError: a weight is missing or has another shape.
        """
        target = check_device(device)
        weightless = skeleton(reader.folder, len(reader.headers))
        prunable(weightless)  # says first if the architecture is one that cannot be pruned
        reader.rename(names_in_memory(weightless, reader))
        _check_headers(reader, weightless)
        super().__init__(skeleton(reader.folder, len(reader.headers), buffers=True))
        self.reader, self.device = reader, target
        first = next(iter(linears(self.modules[0])))
        self.dtype = dtype or reader.headers[f"{self.name(0)}.{first}.weight"][1]
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None
        self._last = -1
        self._pool = ThreadPoolExecutor(1) if target.type == "cuda" else None
        for buffer_owner in self.model.modules():
            for name, buffer in buffer_owner.named_buffers(recurse=False):
                setattr(buffer_owner, name, buffer.to(target))

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        """Give a decoder layer with its weights on the device; they are dropped afterwards."""
        layer = self.modules[index]
        for name, tensor in self._take(index).items():
            _assign(layer, name, tensor.to(self.device, non_blocking=True))
        try:
            yield layer
        finally:
            for name, parameter in list(layer.named_parameters()):
                _assign(layer, name, torch.empty_like(parameter, device=META))

    def load_frame(self, head: bool) -> None:
        """Read embeddings and norms, and with `head` the output head."""
        self._drop_outside()
        wanted = self.model if head else self.model.base_model
        outer = "" if head else f"{self.model.base_model_prefix}."
        for local in wanted.state_dict():
            name = outer + local
            if not name.startswith(self.prefix + ".") and name in self.reader:
                _assign(self.model, name, self._read(name).to(self.device))
        if head:
            self.model.tie_weights()

    def in_float32(self) -> Layers:
        """Return the same model, computing in float32; it reads the same open checkpoint."""
        return StreamedLayers(self.reader, torch.float32, self.device)

    def _drop_outside(self) -> None:
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if not name.startswith(self.prefix + "."):
                _assign(self.model, name, torch.empty_like(parameter, device=META))

    def _take(self, index: int) -> dict[str, Tensor]:
        """Return the layer's tensors, read ahead or now, and start to read the next layer's."""
        if self._pool is None:
            return self._read_layer(index)
        ahead, self._ahead = self._ahead, None
        hit = ahead is not None and ahead[0] == index
        tensors = ahead[1].result() if ahead is not None and hit else self._read_layer(index)
        # Backward passes visit the layers from the last to the first.
        following, self._last = (index - 1 if index == self._last - 1 else index + 1), index
        if 0 <= following < len(self):
            self._ahead = (following, self._pool.submit(self._read_layer, following))
        return tensors

    def _read_layer(self, index: int) -> dict[str, Tensor]:
        names = self.modules[index].state_dict()
        tensors = {local: self._read(f"{self.name(index)}.{local}") for local in names}
        self.reader.release()
        pin = self.device.type == "cuda"
        return {local: t.pin_memory() if pin else t for local, t in tensors.items()}

    def _read(self, name: str) -> Tensor:
        tensor = self.reader.tensor(name)
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{name} holds NaN or Inf: the checkpoint is damaged.")
        # clone(): a tensor of the file's mapping would be changed in place by pruning.
        converted = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
        return converted.clone() if converted is tensor else converted


@contextmanager
def stream(
    folder: ModelFolder, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> Iterator[StreamedLayers]:
    """Open a dense model for streaming; see StreamedLayers.

    Raises:
        InputError: the weights are packed or quantised.
        CheckpointError: a weight is missing or has another shape.
    """
    folder.check_dense()
    with Reader(folder) as reader:
        layers = StreamedLayers(reader, dtype, device)
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


def _check_headers(reader: Reader, model: Any) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    for name, tensor in model.state_dict().items():
        if name in reader:
            shape = reader.headers[name][0]
            if shape != tuple(tensor.shape):
                raise CheckpointError(
                    f"{reader.folder}: {name} is stored as {list(shape)}, but config.json makes it "
                    f"{list(tensor.shape)}."
                )
        elif name not in tied:
            raise CheckpointError(f"{reader.folder}: tensor {name} is missing.")
