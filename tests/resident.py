"""Decoder layers of a model that is in memory as a whole, in place of those read one at a time."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gblm.model.layers import Layers
from gblm.model.linears import decoder_layers


class Resident(Layers):
    """Changes of its layers stay in the model, so that a test can look at all of them."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.prefix, self.modules = decoder_layers(model)
        self.device = next(model.parameters()).device
        self.dtype = next(self.modules.parameters()).dtype

    @contextmanager
    def open(self, index: int) -> Iterator[nn.Module]:
        yield self.modules[index]

    def load_frame(self, head: bool) -> None:
        """All of it is there."""

    def in_float32(self) -> Layers:
        return Resident(copy.deepcopy(self.model).float())
