"""NVRTC compiles every kernel for every GPU, within budgets; cubins are kept on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from cuda_code import ARCHS, VARIANTS, Limits, disassembler, examine

from gblm.errors import MachineError
from gblm.kernels.cuda import nvrtc
from gblm.kernels.cuda.nvrtc import Variant

pytestmark = [
    pytest.mark.skipif(nvrtc.refusal() is not None, reason=str(nvrtc.refusal())),
    pytest.mark.skipif(disassembler() is None, reason="no nvdisasm: make dev installs triton"),
]
# Each for two of the six GPUs.
BUILDS = [
    (variant, limits, arch)
    for index, (variant, limits) in enumerate(VARIANTS.items())
    for arch in ARCHS[index % 3 :: 3]
]
SMALL = Variant("delta", (("BF16", 1), ("TOKENS", 1)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "limits", "arch"),
    BUILDS,
    ids=lambda v: str(v) if isinstance(v, tuple) else getattr(v, "label", ""),
)
def test_machine_code_stays_within_its_budget(
    variant: Variant, limits: Limits, arch: tuple[int, int]
) -> None:
    image = nvrtc.compile_text(variant.text(), variant.options, arch, variant.label)
    kernels = examine(image)
    found = kernels[variant.file]
    assert {name: one.spilled_bytes for name, one in kernels.items()} == dict.fromkeys(kernels, 0)
    assert found.registers <= limits.registers, found
    assert found.instructions(variant) <= limits.instructions, found
    if variant.file == "mma_sp":
        assert found.sparse_products >= 2 * dict(variant.defines)["TOKENS"]


def test_a_cubin_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = nvrtc.cubin(SMALL, (9, 0), tmp_path)
    (file,) = tmp_path.iterdir()
    monkeypatch.delattr(nvrtc, "compile_text")
    assert nvrtc.cubin(SMALL, (9, 0), tmp_path) == first == file.read_bytes()


@pytest.mark.parametrize("damage", [b"", b"not a cubin"])
def test_a_damaged_cubin_is_compiled_again(tmp_path: Path, damage: bytes) -> None:
    first = nvrtc.cubin(SMALL, (9, 0), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage)
    assert nvrtc.cubin(SMALL, (9, 0), tmp_path) == first == file.read_bytes()


def test_another_gpu_and_another_variant_are_other_files(tmp_path: Path) -> None:
    nvrtc.cubin(SMALL, (9, 0), tmp_path)
    nvrtc.cubin(SMALL, (8, 0), tmp_path)
    nvrtc.cubin(Variant("delta", (("BF16", 0), ("TOKENS", 1))), (9, 0), tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert nvrtc.cubin(SMALL, (9, 0), blocked / "below").startswith(b"\x7fELF")


def test_a_source_that_is_wrong_is_refused_with_its_log() -> None:
    with pytest.raises(MachineError, match=r"NVRTC refuses broken for sm_90: .*error"):
        nvrtc.compile_text("nonsense", [], (9, 0), "broken")
