"""Triton compiles its kernels ahead of time for GPUs that are not there, within budgets."""

from __future__ import annotations

from pathlib import Path

import pytest

from gblm.kernels.triton.backend import package_refusal

if package_refusal() is not None:
    pytest.skip(str(package_refusal()), allow_module_level=True)

from triton_code import LIMITS, TARGETS, Case, amd_loop, compile_shares, found

pytestmark = pytest.mark.slow

# Each for two of the four targets.
BUILDS = [(one, name) for index, one in enumerate(LIMITS) for name in list(TARGETS)[index % 2 :: 2]]


@pytest.fixture(scope="module", autouse=True)
def compiled_anew(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize(("one", "name"), BUILDS, ids=lambda v: getattr(v, "label", v))
def test_machine_code_stays_within_its_budget(one: Case, name: str, tmp_path: Path) -> None:
    limits, made = LIMITS[one], found(one, TARGETS[name])
    assert made.image_bytes > 0
    assert made.spilled_bytes == 0
    assert made.registers <= limits.registers, made
    assert made.instructions <= limits.instructions, made
    assert (made.instructions > 0) == (one.tokens > 0), "the main loop was not found"


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_the_shares_are_added_by_a_kernel_that_compiles(name: str) -> None:
    compiled = compile_shares(TARGETS[name])
    assert compiled.asm["cubin" if name == "sm_90" else "hsaco"].startswith(b"\x7fELF")


def test_the_longest_backward_branch_is_the_loop() -> None:
    text = "\ts_mov_b32 s0, 0\n.LBB0_1:\n\tv_add_f32 v0, v0, v1\n\ts_cbranch_scc1 .LBB0_1\n"
    assert amd_loop(text + "\ts_cbranch_scc1 .LBB0_9\n.LBB0_9:\n\ts_endpgm\n") == 2
