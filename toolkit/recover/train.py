"""The training loop of recovery: AdamW within the backward pass, resumed to the same bytes.

Each tensor is stepped as soon as its gradient is complete, and the gradient is freed: gradients of
two tensors never exist at once. (So gradients are neither clipped by their common norm nor
accumulated.) Windows are taken once, in an order that follows from the seed.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from gblm.calibrate.parts import Kind, Part
from gblm.calibrate.ranks import Ranks
from gblm.checkpoint.resume import STATE
from gblm.data import fingerprint
from gblm.errors import InputError
from gblm.files import write_tensors
from gblm.recipe import Recovering
from gblm.recover.teacher import Head, Hidden, divergence, last_hidden

logger = logging.getLogger(__name__)
BETAS, EPS = (0.9, 0.95), 1e-8
WARM_UP = 0.05
# Factors and norms, which move whole rows and columns, bear larger steps than single values.
RATES: dict[Kind, float] = {"value": 1.0, "norm": 4.0, "factor": 2.0}
SAVE_SECONDS = 120.0


def share_of_rate(step: int, total: int) -> float:
    """Return what share of the highest learning rate a step has, counted from 0.

    It rises linearly over 5 % of the steps; from there it follows a cosine to zero.
    """
    warm = max(2, round(WARM_UP * total))
    if step < warm:
        return (step + 1) / (warm + 1)
    done = (step - warm) / max(1, total - warm)
    return 0.5 * (1 + math.cos(math.pi * done))


def batches(how: Recovering, num_windows: int) -> list[Tensor]:
    """Return the indices of each step's windows; what fills no whole batch is left out."""
    order = torch.randperm(num_windows, generator=torch.Generator().manual_seed(how.seed))
    whole = num_windows - num_windows % how.batch_size
    return list(order[:whole].split(how.batch_size))


class Trainer:
    """A model whose parts are trained towards the hidden states of its dense self."""

    def __init__(
        self, model: Any, parts: Mapping[str, Part], how: Recovering, ranks: Ranks
    ) -> None:
        """Freeze the model but for the tensors that have parts."""
        self.model, self.parts, self.how, self.ranks = model, parts, how, ranks
        self.head = Head(model)
        self.losses: list[float] = []
        self._rate = 0.0
        self._adam = {name: _adam(part) for name, part in parts.items()}
        model.requires_grad_(False)
        for name in parts:
            tensor = model.get_parameter(name)
            tensor.requires_grad_(True)
            tensor.register_post_accumulate_grad_hook(self._stepper(name))

    def run(
        self,
        windows: Tensor,
        hidden: Hidden,
        dense_head: Head,
        work: Path,
        told: Callable[[int, float], None],
    ) -> None:
        """Train on all windows once, from the last saved step on.

        Args:
            windows: token ids [num_windows, seq_len] int64.
            hidden: the dense model's last hidden states of them.
            dense_head: of the dense model.
            work: folder of the state, which is saved every two minutes.
            told: called after each step with its number, from 1, and its loss in nats.

        Raises:
            InputError: the loss is not finite; the last saved state is kept.
            MachineError: the disk is full.
        """
        steps, text = batches(self.how, len(windows)), fingerprint(windows)
        self._load(work, text)
        saved = time.monotonic()
        for step in range(len(self.losses), len(steps)):
            self._rate = self.how.learning_rate * share_of_rate(step, len(steps))
            loss = self._step(windows, hidden, dense_head, steps[step])
            if not math.isfinite(loss):
                raise InputError(
                    f"recovery diverged at step {step + 1} (loss {loss}): lower --learning-rate."
                )
            self.losses.append(round(loss, 4))
            told(step + 1, loss)
            if time.monotonic() - saved > SAVE_SECONDS:
                self._save(work, text)
                saved = time.monotonic()

    def _step(self, windows: Tensor, hidden: Hidden, dense_head: Head, picks: Tensor) -> float:
        """Take one step and return the loss before it, the mean over the batch."""
        own = torch.tensor(self.ranks.share(picks.tolist()))
        device = self.head.weight.device
        ours = last_hidden(self.model, windows[own].to(device))
        theirs = hidden.read(own).to(device, ours.dtype)
        flat, dense = ours[:, :-1].flatten(0, 1), theirs[:, :-1].flatten(0, 1)
        loss, gradient = divergence(flat, dense, self.head, dense_head)
        mean = torch.tensor(loss)
        self.ranks.average_(mean)
        if math.isfinite(float(mean)):
            flat.backward(gradient)
        return float(mean)

    def _stepper(self, name: str) -> Callable[[Tensor], None]:
        """Return the hook that steps a part once its tensor's gradient is complete."""
        part, adam = self.parts[name], self._adam[name]

        @torch.no_grad()
        def step(tensor: Tensor) -> None:
            if tensor.grad is None:
                return
            part.take(tensor.grad)
            tensor.grad = None
            for each, group in zip(part.parameters, adam.param_groups, strict=True):
                if each.parameter.grad is not None:
                    self.ranks.average_(each.parameter.grad)
                group["lr"] = self._rate * RATES[each.kind] * each.size
            adam.step()
            adam.zero_grad()
            tensor.copy_(part.give())

        return step

    def _save(self, work: Path, text: str) -> None:
        if not self.ranks.leads:
            return
        tensors: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            state = self._adam[name].state
            for index, (parameter, *_) in enumerate(part.parameters):
                kept = (
                    {"value": parameter.detach(), **state[parameter]} if parameter in state else {}
                )
                tensors |= {f"{name}:{index}:{key}": value for key, value in kept.items()}
        facts = {"losses": json.dumps(self.losses), "text": text}
        write_tensors(work / STATE, tensors, facts)

    def _load(self, work: Path, text: str) -> None:
        path = work / STATE
        if not path.exists():
            return
        with safe_open(path, framework="pt") as file:
            facts = file.metadata()
        if facts["text"] != text:
            raise InputError(f"{path} was trained on other text; remove {work} to start anew.")
        self.losses = json.loads(facts["losses"])
        logger.info("going on after step %d", len(self.losses))
        for key, tensor in load_file(path).items():
            name, index, what = key.rsplit(":", 2)
            parameter = self.parts[name].parameters[int(index)].parameter
            if what == "value":
                parameter.data.copy_(tensor)
            else:
                moved = tensor if what == "step" else tensor.to(parameter.device)
                self._adam[name].state[parameter][what] = moved
        with torch.no_grad():
            for name, part in self.parts.items():
                self.model.get_parameter(name).copy_(part.give())


def _adam(part: Part) -> torch.optim.AdamW:
    groups = [{"params": [each.parameter]} for each in part.parameters]
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, eps=EPS, weight_decay=0.0)


def seconds_per_token(model: Any, batch_size: int, seq_len: int) -> float:
    """Estimate what a token of training takes, the dense model's reading included.

    A pass down and its gradients take three passes up; the rest, with the updates, a quarter more.
    """
    head = Head(model)
    device = head.weight.device
    ids = torch.zeros(batch_size, seq_len, dtype=torch.int64, device=device)
    seconds = 0.0
    for _ in range(2):  # the first time sets up what later ones find ready
        began = time.monotonic()
        with torch.inference_mode():
            hidden = last_hidden(model, ids).flatten(0, 1)
        passed = time.monotonic() - began
        divergence(hidden.clone(), hidden, head, head)
        seconds = 1.25 * (4 * passed + time.monotonic() - began - passed)
    return seconds / ids.numel()
