"""The teacher: what the dense model predicts, and the loss towards it.

A token's last hidden state takes as many bytes as the model is wide, and with the output head it
gives the whole distribution exactly; logits would take as many as there are tokens. So the dense
model is needed once, before training, and never beside the student.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from gblm.errors import InputError
from gblm.files import write_tensors

# Logits that are formed at a time, about 64 MB in float32.
LOGITS = 1 << 24
CHUNK = 64


class Head:
    """A Head turns hidden states into logits, apart from the model that it is of."""

    def __init__(self, model: Any) -> None:
        """Take the head of a loaded model; it is frozen, so it is shared, not copied."""
        embeddings = model.get_output_embeddings()
        self.weight: Tensor = embeddings.weight.detach()
        self.bias: Tensor | None = getattr(embeddings, "bias", None)
        config = model.config.get_text_config()
        self.cap: float | None = getattr(config, "final_logit_softcapping", None)
        self.divisor: float = getattr(config, "logits_scaling", None) or 1.0

    def __call__(self, hidden: Tensor) -> Tensor:
        """Turn last hidden states [tokens, hidden] into logits [tokens, vocabulary] float32."""
        logits = nn.functional.linear(hidden, self.weight, self.bias).float() / self.divisor
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)

    @property
    def rows(self) -> int:
        """Count the tokens whose logits are formed at a time."""
        return max(1, LOGITS // len(self.weight))

    @torch.inference_mode()
    def check(self, model: Any, windows: Tensor) -> None:
        """Refuse a model whose logits this head does not reproduce.

        Args:
            model: the model that the head was taken from.
            windows: token ids [num_windows, seq_len]; the beginning of the first is used.

        Raises:
            InputError: the model does something to its logits that is not known here.
        """
        ids = windows[:1, :8].to(self.weight.device)
        theirs = model(input_ids=ids, use_cache=False).logits[0].float()
        ours = self(last_hidden(model, ids)[0])
        if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
            raise InputError(
                f"{type(model).__name__} computes its logits in a way that recovery does not know; "
                "it cannot be recovered."
            )


def last_hidden(model: Any, windows: Tensor) -> Tensor:
    """Run windows [batch, seq_len] through the model below its head: [batch, seq_len, hidden]."""
    # Llama 4's text model is its own base model, head and all.
    body = model.model if model.base_model is model else model.base_model
    found: Tensor = body(input_ids=windows, use_cache=False).last_hidden_state
    return found


class Hidden:
    """Hidden keeps the dense model's last hidden states of all windows, a few in each file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @torch.inference_mode()
    def fill(self, model: Any, windows: Tensor, step: Callable[[], None]) -> None:
        """Compute what is not there yet.

        Args:
            model: the dense model.
            windows: token ids [num_windows, seq_len] int64.
            step: called after each window.

        Raises:
            MachineError: the disk is full.
        """
        device = next(model.parameters()).device
        for start in range(0, len(windows), CHUNK):
            chunk = windows[start : start + CHUNK]
            if not self._path(start).exists():
                found = [last_hidden(model, one[None].to(device))[0].cpu() for one in chunk]
                write_tensors(self._path(start), {"hidden": torch.stack(found)})
            for _ in chunk:
                step()

    def read(self, indices: Tensor) -> Tensor:
        """Read the states of some windows: [len(indices), seq_len, hidden]."""
        found = []
        for index in indices.tolist():
            with safe_open(self._path(index - index % CHUNK), framework="pt") as file:
                found.append(file.get_slice("hidden")[index % CHUNK])
        return torch.stack(found)

    def _path(self, start: int) -> Path:
        return self.folder / f"hidden-{start:06d}.safetensors"


def divergence(ours: Tensor, theirs: Tensor, head: Head, dense_head: Head) -> tuple[float, Tensor]:
    """Return KL(dense ‖ model) and its gradient; logits of all tokens never exist at once.

    Args:
        ours: the model's last hidden states [tokens, hidden].
        theirs: the dense model's.
        head: of the model.
        dense_head: of the dense model.

    Returns:
        The mean over tokens of Σ_v p_v (log p_v − log q_v) in nats, p dense and q pruned, over the
        whole vocabulary; and its gradient by `ours`, in its dtype.
    """
    total, gradients = 0.0, []
    pairs = zip(ours.detach().split(head.rows), theirs.split(head.rows), strict=True)
    for own, dense in pairs:
        own = own.requires_grad_()
        with torch.enable_grad():
            logq = head(own).log_softmax(-1)
        logp = dense_head(dense).log_softmax(-1)
        p = logp.exp()
        loss = (p * (logp - logq.detach())).sum()
        (gradient,) = torch.autograd.grad(logq, own, -p / len(ours))
        total += float(loss)
        gradients.append(gradient)
    return total / len(ours), torch.cat(gradients)


@torch.inference_mode()
def compare(
    model: Any, windows: Tensor, hidden: Hidden, head: Head, dense_head: Head
) -> dict[str, float]:
    """Hold a model against its dense self on text that it was not trained on.

    Returns:
        "kl", nats; "top1", the share of tokens whose likeliest successor is the same; and
        "perplexity" and "perplexity_dense".
    """
    kl = same = loss = loss_dense = 0.0
    count = 0
    device = head.weight.device
    for index, window in enumerate(windows.to(device)):
        theirs = hidden.read(torch.tensor([index]))[0, :-1].to(device)
        ours = last_hidden(model, window[None])[0, :-1]
        for at in range(0, len(ours), head.rows):
            part = slice(at, at + head.rows)
            logq, logp = head(ours[part]).log_softmax(-1), dense_head(theirs[part]).log_softmax(-1)
            ids = window[1:][part, None]
            kl += float((logp.exp() * (logp - logq)).sum())
            same += int((logp.argmax(-1) == logq.argmax(-1)).sum())
            loss -= float(logq.gather(1, ids).sum())
            loss_dense -= float(logp.gather(1, ids).sum())
        count += len(ours)
    return {
        "kl": kl / count,
        "top1": same / count,
        "perplexity": math.exp(loss / count),
        "perplexity_dense": math.exp(loss_dense / count),
    }
