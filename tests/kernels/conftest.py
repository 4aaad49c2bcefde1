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


def available() -> Iterator[str]:
    """Those of this CPU, best first. Others run emulated: test_amx.py and test_arm64.py."""
    if native.refusal() is not None:
        return
    best = native.instruction_set()
    for name in SETS:
        try:
            native.use_instruction_set(name)
        except native.KernelError:
            continue
        yield name
    native.use_instruction_set(best)


PARAMS = [pytest.param(name, marks=pytest.mark.slow if i else ()) for i, name in
          enumerate(available())]  # fmt: skip


@pytest.fixture(params=PARAMS)
def instructions(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this CPU in turn; the best one again afterwards."""
    best = native.instruction_set()
    native.use_instruction_set(request.param)
    yield request.param
    native.use_instruction_set(best)
