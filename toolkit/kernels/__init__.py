"""One PyTorch op for all formats and backends, and the choice of the backend.

`torch.ops.gblm.linear(x, parts, shape, format, backend)` is opaque to torch.compile and has a
shape function, so every host can trace it.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from gblm.errors import UsageError
from gblm.kernels.base import Backend
from gblm.kernels.cpu import Cpu
from gblm.kernels.cuda.delta import Delta
from gblm.kernels.cuda.mma_sp import SparseTensorCore
from gblm.kernels.plain import Dense, Reference
from gblm.kernels.triton.backend import Triton
from gblm.sparse.formats import Format, Shape, from_spec

__all__ = [
    "BACKENDS", "Backend", "check_backend", "linear", "log_choice", "requested_backend", "select",
]  # fmt: skip

logger = logging.getLogger(__name__)

# In order of preference: the first that does not refuse serves a weight.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Cpu(),
        SparseTensorCore(),
        Delta(),
        Triton(),
        Dense(),
        Reference(),
    )
}
BACKEND_VARIABLE = "GBLM_BACKEND"


def requested_backend() -> str | None:
    """Read which backend the environment variable GBLM_BACKEND forces, if any."""
    return os.environ.get(BACKEND_VARIABLE) or None


def check_backend(name: str) -> None:
    """Raise UsageError for a name that no backend has."""
    if name not in BACKENDS:
        raise UsageError(f"backend {name!r} is unknown: choose from {', '.join(BACKENDS)}.")


def select(
    fmt: Format,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    forced: str | None = None,
) -> tuple[Backend, list[str]]:
    """Choose the backend of one weight.

    Args:
        fmt: the weight's format.
        shape: the weight's [out, in].
        dtype: the activations' dtype.
        device: where the weight will be used.
        forced: a name of BACKENDS that must be taken.

    Returns:
        The backend; and sentences that say why better ones refused.

    Raises:
        UsageError: `forced` is unknown or refuses.
    """
    if forced is not None:
        check_backend(forced)
    reasons: list[str] = []
    for backend in [BACKENDS[forced]] if forced else BACKENDS.values():
        reason = refusal(backend, fmt, shape, dtype, device)
        if reason is None:
            return backend, reasons
        reasons.append(f"{backend.name}: {reason}")
    raise UsageError(f"no backend can serve {fmt.spec} {list(shape)} {dtype}: {'; '.join(reasons)}")


def refusal(
    backend: Backend, fmt: Format, shape: Shape, dtype: torch.dtype, device: torch.device
) -> str | None:
    """Say why a backend cannot serve such a weight, for people; None when it can."""
    if backend.formats and fmt.name not in backend.formats:
        return f"it does not know the format {fmt.name}"
    if backend.formats and fmt.values.bits not in Format.bits:
        return f"it does not know values of {fmt.values.bits} bits"
    return backend.refuses(fmt, shape, dtype, device)


def log_choice(chosen: Iterable[tuple[Backend, Sequence[str]]]) -> None:
    """Log one line per backend: for how many linears it runs, and why better ones refused."""
    picks = list(chosen)
    for name, count in Counter(backend.name for backend, _ in picks).items():
        own = (why for backend, why in picks if backend.name == name)
        reasons = list(dict.fromkeys(reason for why in own for reason in why))
        state = "(packed in memory)"
        if not BACKENDS[name].packed:
            state = "(expanded at load): memory is the dense model's"
        because = f"; refused: {' · '.join(reasons)}" if reasons else ""
        logger.info("gblm: %d linears run on backend %s %s%s", count, name, state, because)


_LIBRARY = torch.library.Library("gblm", "DEF")
_LIBRARY.define("linear(Tensor x, Tensor[] parts, int[] shape, str format, str backend) -> Tensor")


def _linear(x: Tensor, parts: list[Tensor], shape: list[int], fmt: str, backend: str) -> Tensor:
    return BACKENDS[backend].linear(x, parts, from_spec(fmt), (shape[0], shape[1]))


def _linear_fake(
    x: Tensor, parts: list[Tensor], shape: list[int], fmt: str, backend: str
) -> Tensor:
    torch._check(x.shape[-1] == shape[1], lambda: f"x has {x.shape[-1]} features, not {shape[1]}")
    return x.new_empty((*x.shape[:-1], shape[0]))


# The kernels of csrc/ register themselves for it, once they are loaded.
_LIBRARY.define("cpu_linear(Tensor x, Tensor panels, int out_features) -> Tensor")


def _cpu_linear_fake(x: Tensor, panels: Tensor, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


_LIBRARY.define(
    "cpu_experts(Tensor x, Tensor ids, Tensor shares, Tensor panels, Tensor places) -> Tensor"
)


def _cpu_experts_fake(
    x: Tensor, ids: Tensor, shares: Tensor, panels: Tensor, places: Tensor
) -> Tensor:
    return x.new_empty(x.shape)


_LIBRARY.impl("cpu_experts", _cpu_experts_fake, "Meta")
_LIBRARY.impl("cpu_linear", _cpu_linear_fake, "Meta")
_LIBRARY.impl("linear", _linear, "CompositeExplicitAutograd")
_LIBRARY.impl("linear", _linear_fake, "Meta")


def linear(
    x: Tensor, prepared: list[Tensor], shape: Shape, fmt: Format, backend: Backend
) -> Tensor:
    """Multiply x [..., in] @ W.T to [..., out] with what `backend.prepare` returned."""
    if backend.own_op:
        return backend.linear(x, prepared, fmt, shape)
    out: Tensor = torch.ops.gblm.linear(x, prepared, list(shape), fmt.spec, backend.name)
    return out
