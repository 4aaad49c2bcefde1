"""What the tests of the compiled kernels share."""

from __future__ import annotations

import platform
from collections.abc import Iterator

import pytest

from gblm.kernels import native

SETS = {
    "x86_64": ("amx", "avx512", "avx2", "portable"),
    "aarch64": ("neon_bf16", "neon", "portable"),
}.get(platform.machine(), ("portable",))


@pytest.fixture(params=SETS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU in turn; the best one again afterwards."""
    best = native.instruction_set()
    try:
        native.use_instruction_set(request.param)
    except native.KernelError:
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    native.use_instruction_set(best)
