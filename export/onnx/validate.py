"""Hold an export against torch, which runs the very weights that the graph holds.

Two questions are asked apart, as the answer to the second would hide a single wrong block of codes.

Are the weights right? Those of packed linears and of ONNX Runtime's own integers are read back from
the files. Packed ones must equal the checkpoint's, value by value. ONNX Runtime's are codes times
the scale of their block, rounded to the nearest: none may be further than half a scale from the
checkpoint's, or a whole one at the largest code, where larger values are cut off. Torch takes these
rounded weights over.

Is the arithmetic right? Now graph and torch differ by what they round on the way alone. To first
order the error of a logit is the sum, over all linears, of its derivative times the rounding error
of what the linear multiplies. Such errors have mean zero and do not depend on each other, so their
mean square over a vocabulary is known from any one draw of them: torch's own, when its linears
round what they are given as the graph's do.

* int8, one scale for each token and group of inputs: ours with integer weights, ONNX Runtime's at
  accuracy level 4. The scale is the largest value of the group / 127.
* float32: to 16 bits. That is what AMX multiplies (two terms of bfloat16), and no less than what a
  sum of up to 2^14 products loses in 24 bits: a random walk of sqrt(2^14) steps of 2^-24 is 2^-17.
  On CUDA to 11 bits, those of TF32.
* float16, bfloat16: torch computes in that dtype.

A graph may be ALLOWED times as far from exact torch as rounding torch is. The tokens that torch
chooses are fed all at once, which checks the prefill, and one by one, which checks the cache; the
worst place of both counts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gblm.errors import CheckpointError
from gblm.export.onnx.decoder import OnnxDecoder
from gblm.export.onnx.rewrite import GATE_UP, Replaced, linears_behind, read
from gblm.export.onnx.runtime import DOMAIN, MODEL_FILE
from gblm.kernels import native
from gblm.packed import SparseLinear

if TYPE_CHECKING:
    import onnx_ir as ir

PROMPT = (
    "The steam engine changed how people worked and lived. Before it, most goods were made by "
    "hand, in small shops or at home. In the years that followed,"
)
# Seen: 0.8 to 1.2, for roundings at the same places are much alike.
ALLOWED = 2.0
FLOAT_BITS = {"cpu": 16, "cuda": 11}


@torch.no_grad()
def validate(
    model: nn.Module, prompt: Tensor, folder: Path, count: int, replaced: Sequence[Replaced]
) -> dict[str, Any]:
    """Compare an export with the model it came from.

    Args:
        model: the original in float32, on CPU; it takes the graph's weights over.
        prompt: [tokens] int64.
        folder: the export.
        count: tokens to generate.
        replaced: what was packed in the graph.

    Returns:
        Figures, and `passed`.
    """
    import onnx_ir as ir

    groups, wrong = adopt_weights(model, ir.load(folder / MODEL_FILE).graph, replaced)
    tokens, expected = torch_greedy(model, prompt, count)
    forced = torch.cat([prompt, torch.tensor(tokens[:-1], dtype=torch.long)])
    decoder = OnnxDecoder(folder)
    prefill, decode = decoder.step(forced)[-count:], _one_by_one(decoder, prompt, tokens)
    # Up to the first other token, what was chosen freely is what was fed.
    others = (decode.argmax(-1) != torch.tensor(tokens)).nonzero()
    bits, dtype = FLOAT_BITS[decoder.device], getattr(torch, decoder.dtype)
    rounded = rounding(model, groups, bits, dtype, forced)[-count:]
    worst = max(deviation(prefill, expected), deviation(decode, expected))
    allowed = ALLOWED * deviation(rounded, expected)
    return {
        "reference": "torch float32, with the weights that the graph holds",
        "tokens": count,
        "prompt_tokens": prompt.numel(),
        "equal_greedy_tokens": int(others[0]) if len(others) else count,
        "max_logit_difference": float((prefill - expected).abs().max()),
        "logit_deviation": worst,
        "allowed_logit_deviation": allowed,
        "wrong_weights": wrong,
        "device": decoder.device,
        "passed": worst <= allowed < math.inf and not wrong,
    }


def deviation(logits: Tensor, expected: Tensor) -> float:
    """Give the root mean square difference of logits [count, vocabulary] in the worst place."""
    found = float((logits - expected).square().mean(-1).sqrt().max())
    # NaN compares as false everywhere, and must not pass for it.
    return found if found == found else float("inf")


def adopt_weights(
    model: nn.Module, graph: ir.Graph, replaced: Sequence[Replaced]
) -> tuple[dict[nn.Module, int], list[str]]:
    """Hold the weights of a graph against the model's, which then takes them over.

    Args:
        model: with float32 weights in memory.
        graph: an export.
        replaced: what was packed in it.

    Returns:
        How many inputs of a linear share an int8 scale, 0 for none; and the names of linears whose
        weights are further from the model's than their type rounds.
    """
    if not any(node.op_type == "GatherBlockQuantized" for node in graph):
        _untie(model)
    groups: dict[nn.Module, int] = {}
    wrong: list[str] = []
    for linears, weight, off, group in _stored(model, graph, replaced):
        places = [_place(model, name) for name in linears]
        own = torch.cat([rows for _, rows in places])
        if not bool(((weight - own).abs() <= off).all()):
            wrong += linears
        pieces = weight.split([len(rows) for _, rows in places])
        for (module, rows), piece in zip(places, pieces, strict=True):
            rows.copy_(piece)
            groups[module] = group
    return groups, wrong


def _untie(model: nn.Module) -> None:
    """Give the head a weight of its own: the graph's head may be rounded, its embeddings not."""
    head = model.get_submodule("lm_head")
    if isinstance(head, nn.Linear):
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)


def _place(model: nn.Module, name: str) -> tuple[nn.Module, Tensor]:
    """Find a linear's module and its weight [out, in] there, which may be half of a fused one."""
    modules = dict(model.named_modules())
    stem, _, part = name.rpartition(".")
    module = modules[name if name in modules else f"{stem}.gate_up_proj"]
    weight = module.prepared[0] if isinstance(module, SparseLinear) else module.weight
    return module, weight if name in modules else weight.chunk(2)[GATE_UP.index(part)]


def _stored(
    model: nn.Module, graph: ir.Graph, replaced: Sequence[Replaced]
) -> Iterator[tuple[Sequence[str], Tensor, Tensor, int]]:
    """Read weights [out, in] back: whose they are, the values, how far they may be off, groups."""
    modules = dict(model.named_modules())
    panels = {f"{one.linears[0]}.panels": one.linears for one in replaced}
    for node in graph:
        own = node.domain == DOMAIN
        if not own and node.op_type != "MatMulNBits":
            continue
        data = [value for value in node.inputs[1:] if value is not None]
        name = str(data[0].name)
        linears = panels[name] if own else linears_behind([name], modules.__contains__)
        if not linears:
            raise CheckpointError(f"the graph's {name} is no linear's weight.")
        facts = {attribute.name: attribute.value for attribute in node.attributes.values()}
        yield linears, *(_panels(read(data[0])) if own else _blocks(facts, *data[:2]))


def _panels(stored: Tensor) -> tuple[Tensor, Tensor, int]:
    """Unpack the weight of an operator of ours."""
    values, _, scales = native.unpack(stored)
    if scales is None:
        return values.float(), torch.zeros(()), 0
    group = values.shape[1] // scales.shape[1]
    return values * scales.float().repeat_interleave(group, 1), torch.zeros(()), group


def _blocks(facts: dict[str, Any], stored: ir.Value, scale: ir.Value) -> tuple[Tensor, Tensor, int]:
    """Unpack the weight of a MatMulNBits: codes around the middle of their range, times scales."""
    rows, columns, block = facts["N"], facts["K"], facts["block_size"]
    middle = 1 << facts["bits"] - 1
    codes = read(stored).reshape(rows, -1)
    if facts["bits"] == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1)
    codes = codes.reshape(rows, -1, block)
    scales = read(scale).reshape(rows, -1, 1)
    values = (codes.float() - middle) * scales
    cut = codes == 2 * middle - 1
    # And two roundings of the scale's dtype: of itself, and of the quotient.
    eps = torch.finfo(getattr(torch, str(scale.dtype and scale.dtype.numpy()))).eps
    off = scales.abs() * torch.where(cut, 1.0, 0.5) + 2 * eps * values.abs()
    group = block if facts.get("accuracy_level") == 4 else 0
    return values.flatten(1)[:, :columns], off.flatten(1)[:, :columns], group


def rounding(
    model: nn.Module, groups: dict[nn.Module, int], bits: int, dtype: torch.dtype, tokens: Tensor
) -> Tensor:
    """Run torch with the graph's roundings.

    Args:
        model: it is left in `dtype`.
        groups: of linears whose inputs are rounded to int8, as `adopt_weights` gives them.
        bits: of all other linears' inputs.
        dtype: that the graph computes in.
        tokens: [count] int64.

    Returns:
        Logits [count, vocabulary] float32.
    """
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Linear | SparseLinear):
                hook = partial(_round_input, group=groups.get(module, 0), bits=bits)
                hooks.callback(module.register_forward_pre_hook(hook).remove)
        logits: Tensor = model.to(dtype)(input_ids=tokens[None], use_cache=False).logits
    return logits[0].float()


def _round_input(
    module: nn.Module, given: tuple[Tensor, ...], group: int, bits: int
) -> tuple[Tensor]:
    """Round what a linear is given: to int8 in groups, or to so many bits of mantissa."""
    x = given[0].float()
    if not group:
        mantissa, exponent = torch.frexp(x)
        return (torch.ldexp((mantissa * 2**bits).round() / 2**bits, exponent).to(given[0].dtype),)
    groups = functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))
    step = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    rounded = ((groups / step).round() * step).flatten(-2)[..., : x.shape[-1]]
    return (rounded.to(given[0].dtype),)


def _one_by_one(decoder: OnnxDecoder, prompt: Tensor, tokens: list[int]) -> Tensor:
    decoder.reset()
    rows = [decoder.step(prompt)[-1:]]
    rows += [decoder.step(torch.tensor([token])) for token in tokens[:-1]]
    return torch.cat(rows)


def torch_greedy(model: nn.Module, prompt: Tensor, count: int) -> tuple[list[int], Tensor]:
    """Generate the likeliest tokens one by one, with their logits [count, vocabulary] float32."""
    past, tokens, rows, step = None, [], [], prompt[None]
    for _ in range(count):
        out = model(input_ids=step, past_key_values=past, use_cache=True)
        past = out.past_key_values
        rows.append(out.logits[0, -1].float())
        tokens.append(int(rows[-1].argmax()))
        step = torch.tensor([tokens[-1:]])
    return tokens, torch.stack(rows)
