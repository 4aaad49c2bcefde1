"""Triton compiles its kernels ahead of time for GPUs that are not there, and nothing spills."""

from __future__ import annotations

import pytest

from gblm.kernels.triton.backend import package_refusal

if package_refusal() is not None:
    pytest.skip(str(package_refusal()), allow_module_level=True)

from triton_code import CASES, TARGETS, Case, compile_shares, spilled_bytes

pytestmark = pytest.mark.slow

# Each for two of the four targets.
BUILDS = [(one, name) for index, one in enumerate(CASES) for name in list(TARGETS)[index % 2 :: 2]]


@pytest.fixture(scope="module", autouse=True)
def compiled_anew(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize(("one", "name"), BUILDS, ids=lambda v: getattr(v, "label", v))
def test_kernels_compile_without_spilling(one: Case, name: str) -> None:
    assert spilled_bytes(one, TARGETS[name]) == 0


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_the_shares_are_added_by_a_kernel_that_compiles(name: str) -> None:
    compiled = compile_shares(TARGETS[name])
    assert compiled.asm["cubin" if name == "sm_90" else "hsaco"].startswith(b"\x7fELF")
