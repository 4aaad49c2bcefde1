"""ai.gblm::Linear in ONNX Runtime, against float64."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from weights import weight_of

from gblm.kernels import native
from gblm.kernels.cpu import Cpu
from gblm.sparse.formats import Format, format_for
from gblm.sparse.patterns import parse
from gblm.sparse.values import parse_values
from gblm.sparse.weights import SparseWeight

onnx = pytest.importorskip("onnx", reason="onnx: make dev installs it")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime: make dev installs it")
pytestmark = pytest.mark.skipif(native.refusal() is not None, reason=str(native.refusal()))

ROOT = Path(__file__).resolve().parents[2]
FLOAT, FLOAT16, BFLOAT16, DOUBLE, UINT8 = 1, 10, 16, 11, 2
HEADER = "onnxruntime_c_api.h"


def make_weight(rows: int, columns: int, pattern: str, values: str) -> tuple[Tensor, Tensor]:
    """Give the weight that is meant [rows, columns] float64, and its panels."""
    fmt = format_for(parse(pattern), parse_values(values).resolve("weight", columns))
    weight = weight_of(fmt, (rows, columns))
    exact = fmt.expand(fmt.pack("weight", weight), torch.float64).double()
    return exact, panels_of(fmt, weight)


def panels_of(fmt: Format, weight: SparseWeight) -> Tensor:
    shape = (weight.mask.shape[0], weight.mask.shape[1])
    return Cpu().prepare(fmt, fmt.pack("weight", weight), shape)[0]


def make_session(
    panels: Tensor, rows: int, columns: int, dtype: int = FLOAT, threads: int = 2,
    constant: bool = True, op: str = "Linear",
) -> onnxruntime.InferenceSession:  # fmt: skip
    helper = onnx.helper
    node = helper.make_node(
        op, ["x", "panels"], ["y"], domain="ai.gblm", out_features=rows, in_features=columns
    )
    inputs = [helper.make_tensor_value_info("x", dtype, ["batch", "tokens", "features"])]
    if not constant:
        inputs.append(helper.make_tensor_value_info("panels", UINT8, [panels.numel()]))
    held = [onnx.numpy_helper.from_array(panels.numpy(), "panels")] if constant else []
    output = helper.make_tensor_value_info("y", dtype, None)
    graph = helper.make_graph([node], "graph", inputs, [output], held)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("ai.gblm", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(native.LIBRARY))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def run(session: onnxruntime.InferenceSession, x: Tensor, rows: int) -> Tensor:
    """y in float64, whatever the dtype of x."""
    if x.dtype != torch.bfloat16:
        return torch.from_numpy(session.run(None, {"x": x.numpy()})[0]).double()
    y = torch.empty(*x.shape[:-1], rows, dtype=torch.bfloat16)
    binding = session.io_binding()
    for bind, name, tensor in (("input", "x", x), ("output", "y", y)):
        getattr(binding, f"bind_{bind}")(
            name, "cpu", 0, BFLOAT16, tuple(tensor.shape), tensor.data_ptr()
        )
    session.run_with_iobinding(binding)
    return y.double()


# Largest error over the largest result: bf16 terms hold 16 bits; integer weights round activations
# to int8; the others round y.
BOUNDS = {FLOAT: 1e-5, FLOAT16: 1e-3, BFLOAT16: 6e-3}
INT_BOUND = 0.02


DTYPES = {FLOAT: torch.float32, FLOAT16: torch.float16, BFLOAT16: torch.bfloat16}
TOKENS = (1, 3, 17, 300)


def drawn(tokens: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(2, tokens, columns, generator=generator).to(dtype)


def error(y: Tensor, expected: Tensor) -> float:
    assert y.shape == expected.shape
    return float((y - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("values", ["float", "int8", "int4"])
@pytest.mark.parametrize("pattern", ["dense", "0.5", "2:4"])
def test_operator_multiplies(instructions: str, pattern: str, values: str) -> None:
    rows, columns = 72, 192
    weight, panels = make_weight(rows, columns, pattern, values)
    for dtype, kind in DTYPES.items():
        session = make_session(panels, rows, columns, dtype)
        for tokens in TOKENS:
            x = drawn(tokens, columns, kind)
            bound = BOUNDS[dtype] if values == "float" else INT_BOUND
            assert error(run(session, x, rows), x.double() @ weight.T) < bound


@pytest.mark.parametrize("values", ["float", "int8"])
def test_gated_operator_is_silu_of_one_half_times_the_other(instructions: str, values: str) -> None:
    features, columns = 40, 192
    weight, panels = make_weight(2 * features, columns, "0.5", values)
    for dtype, kind in DTYPES.items():
        session = make_session(panels, features, columns, dtype, op="GatedLinear")
        for tokens in TOKENS:
            x = drawn(tokens, columns, kind) / 4
            gate, up = (x.double() @ weight.T).chunk(2, dim=-1)
            bound = BOUNDS[dtype] if values == "float" else 2 * INT_BOUND
            y = run(session, x, features)
            assert error(y, torch.nn.functional.silu(gate) * up) < bound


def test_gates_far_from_zero_are_open_or_shut(instructions: str) -> None:
    weight = torch.zeros(64, 32, dtype=torch.bfloat16)
    weight[:32] = torch.eye(32)  # gates
    weight[32:, 0] = 1  # what they let through
    panels = panels_of(format_for(parse("0.5")), SparseWeight.cut(weight, weight.bool()))
    session = make_session(panels, 32, 32, op="GatedLinear")
    x = torch.arange(-128.0, 128.0, 8).reshape(1, 1, 32)
    x[0, 0, 0] = 1
    expected = torch.nn.functional.silu(x.double())
    torch.testing.assert_close(run(session, x, 32), expected, rtol=1e-6, atol=1e-35)


def test_float32_activations_are_not_rounded_to_bfloat16() -> None:
    weight, panels = make_weight(64, 64, "0.5", "float")
    x = torch.full((1, 1, 64), 1 + 2**-12)
    y = run(make_session(panels, 64, 64), x, 64)
    rounded = x.bfloat16().double() @ weight.T
    exact = x.double() @ weight.T
    assert float((y - exact).abs().max()) < 0.02 * float((rounded - exact).abs().max())


def test_extreme_activations_stay_what_they_are() -> None:
    weight, panels = make_weight(16, 32, "dense", "float")
    session = make_session(panels, 16, 32)
    largest = torch.zeros(1, 1, 32)
    largest[0, 0, 3] = torch.finfo(torch.float32).max / weight.abs().max()
    found = run(session, largest, 16)
    torch.testing.assert_close(found, largest.double() @ weight.T, rtol=2**-7, atol=0)
    for value in (float("inf"), float("nan")):
        odd = torch.zeros(1, 1, 32)
        odd[0, 0, 3] = value
        assert not bool(run(session, odd, 16).isfinite().any())


@pytest.mark.parametrize("value", [0.0, 6.1e-5, 5.96e-8, 65504.0, -1.0, 1 / 3, float("inf")])
def test_float16_is_read_and_written_exactly(value: float) -> None:
    identity = SparseWeight.cut(torch.eye(32, dtype=torch.bfloat16), torch.eye(32).bool())
    panels = panels_of(format_for(parse("0.5")), identity)
    x = torch.zeros(1, 1, 32, dtype=torch.float16)
    x[0, 0, 0] = value
    y = run(make_session(panels, 32, 32, FLOAT16), x, 32)
    assert float(y[0, 0, 0]) == float(x[0, 0, 0])


def test_no_tokens_give_no_rows() -> None:
    _, panels = make_weight(16, 32, "0.5", "float")
    assert run(make_session(panels, 16, 32), torch.zeros(1, 0, 32), 16).shape == (1, 0, 16)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads: int) -> None:
    _, panels = make_weight(200, 64, "0.5", "float")
    x = torch.randn(1, 5, 64)
    alone = run(make_session(panels, 200, 64, threads=1), x, 200)
    assert run(make_session(panels, 200, 64, threads=threads), x, 200).equal(alone)


def test_shape_inference_keeps_the_names_of_dimensions() -> None:
    _, panels = make_weight(16, 32, "0.5", "float")
    assert make_session(panels, 16, 32).get_outputs()[0].shape == ["batch", "tokens", 16]


def damage(panels: Tensor, at: int) -> Tensor:
    damaged = panels.clone()
    damaged[at] ^= 0xFF
    return damaged


BAD = {
    "not constant": (lambda p: make_session(p, 16, 32, constant=False), "constant initializer"),
    "cut off": (lambda p: make_session(p[:-64].clone(), 16, 32), "damaged"),
    "another version": (lambda p: make_session(damage(p, 4), 16, 32), "export the model again"),
    "another shape": (lambda p: make_session(p, 32, 32), "another shape"),
    "float64": (lambda p: make_session(p, 16, 32, DOUBLE).run(
        None, {"x": np.zeros((1, 1, 32))}), "float32, float16 or bfloat16"),
    "features": (lambda p: make_session(p, 16, 32).run(
        None, {"x": np.zeros((1, 1, 31), dtype=np.float32)}), "x must have 32 features"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_with_a_sentence(name: str) -> None:
    _, panels = make_weight(16, 32, "0.5", "float")
    attempt, message = BAD[name]
    call: Callable[[Tensor], object] = attempt
    with pytest.raises(Exception, match=message):
        call(panels)


def test_declared_abi_is_that_of_the_header(tmp_path: Path) -> None:
    folders = [os.environ.get("ONNXRUNTIME_INCLUDE_DIR"), "/usr/include/onnxruntime"]
    found = [folder for folder in folders if folder and (Path(folder) / HEADER).exists()]
    if not found:
        pytest.skip(f"{HEADER} is not there: install libonnxruntime-dev, or set "
                    "ONNXRUNTIME_INCLUDE_DIR")  # fmt: skip
    source = ROOT / "tests/kernels/ort_abi.cpp"
    include = [f"-I{ROOT / 'toolkit/kernels/csrc'}", f"-I{found[0]}"]
    subprocess.run(["g++", "-std=c++17", "-fsyntax-only", *include, str(source)], check=True)
