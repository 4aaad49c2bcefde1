"""Triton compiles its kernels ahead of time for GPUs that are not there, and nothing spills."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gblm.kernels.triton.backend import (
    ADDED,
    COMPILER,
    DENSE,
    Blocks,
    Stored,
    blocks,
    package_refusal,
    sized,
)

if package_refusal() is not None:
    pytest.skip(str(package_refusal()), allow_module_level=True)

import triton
from cuda_code import examine
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gblm.kernels.triton import kernels

pytestmark = pytest.mark.slow

SHAPE, UNITS = (4096, 4096), 132
CUDA, HIP = "cuda", "hip"
TARGETS = {
    "sm_80": GPUTarget(CUDA, 80, 32),
    "sm_90": GPUTarget(CUDA, 90, 32),
    "sm_120": GPUTarget(CUDA, 120, 32),
    "gfx942": GPUTarget(HIP, "gfx942", 64),
}


# Kinds of stored weight, and tokens to multiply; none: the kernel that expands it. Then whether
# they are pairs of a token, which has chosen eight experts, and an expert.
CASES = [
    (Stored(True, 16, 0), 1, False),
    (Stored(True, 16, 0), 16, False),
    (Stored(False, 16, 0), 1, False),
    (Stored(False, 4, 32), 16, False),
    (Stored(True, 4, 128), 1, False),
    (Stored(False, 16, 0), 0, False),
    (Stored(True, 8, 128), 1, True),
    (Stored(True, 4, 128), 16, True),
    (Stored(True, 16, 0), 64, True),
    (Stored(False, 4, 0), 64, True),
]
# Each for two of the four targets.
BUILDS = [(*one, name) for index, one in enumerate(CASES) for name in list(TARGETS)[index % 2 :: 2]]


def compile_case(stored: Stored, tokens: int, has_pairs: bool, target: GPUTarget) -> Any:
    """Compile a kernel for weights of SHAPE, as the JIT would for aligned arrays."""
    if tokens:
        fn, block = kernels.multiply, blocks(stored, SHAPE, tokens, UNITS)
    else:
        fn, block = kernels.expand, Blocks(*sized(DENSE, stored), 0, 1)
    constants = stored.options(SHAPE, block.rows, block.columns) | {"FLOAT": kernels.tl.bfloat16}
    if tokens:
        constants |= {"TOKENS": block.tokens, "SPLIT": block.split, "CHOSEN": 8 * has_pairs}
        constants |= {} if has_pairs else {"order": None, "groups": None}
    values = {8: "*i16", 16: "*i32"} if stored.two_four else {8: "*i8", 16: "*bf16"}
    types = {
        "x": "*i64", "values": values.get(stored.kind, "*u8"), "words": "*i32",
        "starts": "*i16", "begins": "*i64", "scales": "*bf16",
        "out": "*bf16" if block.split == 1 else "*fp32",
        "order": "*i64", "groups": "*i64", "tokens": "i32", "rows": "i32", "columns": "i32",
    }  # fmt: skip
    return compile_kernel(fn, types, constants, target)


def compile_kernel(
    fn: Any, types: dict[str, str], constants: dict[str, Any], target: GPUTarget
) -> Any:
    """As the JIT would for arrays and numbers that 16 divides, but `tokens` and `size`."""
    names, any_number = fn.arg_names, ("tokens", "size", *constants)
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        fn=fn,
        signature={name: signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(names) if name not in any_number
        },
    )  # fmt: skip
    return triton.compile(source, target=target, options=COMPILER)


@pytest.fixture(scope="module", autouse=True)
def compiled_anew(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.mark.parametrize(("stored", "tokens", "has_pairs", "name"), BUILDS, ids=str)
def test_kernels_compile_without_spilling(
    stored: Stored, tokens: int, has_pairs: bool, name: str
) -> None:
    compiled = compile_case(stored, tokens, has_pairs, TARGETS[name])
    if TARGETS[name].backend == CUDA:
        (kernel,) = examine(compiled.asm["cubin"]).values()
        assert kernel.spilled_bytes == 0
    else:
        private = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", compiled.asm["amdgcn"])
        assert private == ["0"]


@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_the_shares_are_added_by_a_kernel_that_compiles(name: str) -> None:
    types = {"shares": "*fp32", "out": "*bf16", "size": "i32"}
    constants = {"SPLIT": 8, "BLOCK": ADDED}
    compiled = compile_kernel(kernels.add_shares, types, constants, TARGETS[name])
    assert compiled.asm["cubin" if name == "sm_90" else "hsaco"].startswith(b"\x7fELF")
