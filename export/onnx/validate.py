"""An exported model against the original torch model, never against another export.

The tokens that torch chooses are fed all at once, which checks the prefill, and one by one, which
checks the cache; the worse of both is judged. Free greedy tokens are counted besides.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm.export.onnx.decoder import OnnxDecoder
from gblm.model.folder import ModelFolder

PROMPT = (
    "The steam engine changed how people worked and lived. Before it, most goods were made by "
    "hand, in small shops or at home. In the years that followed,"
)
PROMPT_TOKENS = 24  # of a model without tokenizer


@dataclass(frozen=True)
class Tolerance:
    """Bounds what an export may differ from the original.

    `logit_difference` bounds the largest absolute difference of a logit, in standard deviations of
    the original's logits; None leaves it unjudged. `top1_agreement` is the least share of positions
    where both name the same next token.
    """

    logit_difference: float | None
    top1_agreement: float


# fp32 rounds otherwise; the others round weights or activations, too.
TOLERANCES = {
    "fp32": Tolerance(0.01, 0.98),
    "fp16": Tolerance(0.1, 0.95),
    "bf16": Tolerance(0.5, 0.9),
    "int8": Tolerance(None, 0.85),
    "int4": Tolerance(None, 0.4),
    "sparse": Tolerance(0.01, 0.98),
    "sparse-int": Tolerance(None, 0.85),
}


def validate(
    model: nn.Module, source: Path, folder: Path, count: int, tolerance: Tolerance
) -> dict[str, Any]:
    """Compare an export with the model it came from.

    Args:
        model: the original in float32, on CPU.
        source: its folder, for the tokenizer.
        folder: the export.
        count: tokens to generate.
        tolerance: what counts as passed.

    Returns:
        Figures, and `passed`.
    """
    prompt = prompt_tokens(source, model)
    tokens, expected = torch_greedy(model, prompt, count)
    decoder = OnnxDecoder(folder)
    prefill = _Difference.of(_at_once(decoder, prompt, tokens), expected)
    decode = _Difference.of(_one_by_one(decoder, prompt, tokens), expected)
    found = greedy(decoder, prompt, count)
    same = next((i for i, (a, b) in enumerate(zip(tokens, found, strict=True)) if a != b), count)
    worst = max(prefill.relative, decode.relative)
    agreement = min(prefill.agreement, decode.agreement)
    within = tolerance.logit_difference is None or worst <= tolerance.logit_difference
    return {
        "reference": "torch float32, the checkpoint's own values",
        "tokens": count,
        "prompt_tokens": prompt.numel(),
        "max_logit_difference": max(prefill.largest, decode.largest),
        "max_logit_difference_over_std": worst,
        "top1_agreement": agreement,
        "equal_greedy_tokens": same,
        "prefill": asdict(prefill),
        "decode": asdict(decode),
        "device": decoder.device,
        "tolerance": {
            "max_logit_difference_over_std": tolerance.logit_difference,
            "top1_agreement": tolerance.top1_agreement,
        },
        "passed": within and agreement >= tolerance.top1_agreement,
    }


@dataclass(frozen=True)
class _Difference:
    """Says how far logits [count, vocabulary] are from the original's.

    `largest` is the largest absolute difference, `relative` the same in standard deviations of the
    original's logits, and `agreement` the share of rows with the same largest logit.
    """

    largest: float
    relative: float
    agreement: float

    @classmethod
    def of(cls, logits: Tensor, expected: Tensor) -> _Difference:
        largest = float((logits - expected).abs().max())
        same = logits.argmax(-1) == expected.argmax(-1)
        # NaN compares as false everywhere, and must not pass for it.
        largest = largest if largest == largest else float("inf")
        return cls(largest, largest / float(expected.std()), float(same.float().mean()))


def _at_once(decoder: OnnxDecoder, prompt: Tensor, tokens: list[int]) -> Tensor:
    decoder.reset()
    forced = torch.cat([prompt, torch.tensor(tokens[:-1], dtype=torch.long)])
    return decoder.step(forced)[prompt.numel() - 1 :]


def _one_by_one(decoder: OnnxDecoder, prompt: Tensor, tokens: list[int]) -> Tensor:
    decoder.reset()
    rows = [decoder.step(prompt)[-1:]]
    rows += [decoder.step(torch.tensor([token])) for token in tokens[:-1]]
    return torch.cat(rows)


def greedy(decoder: OnnxDecoder, prompt: Tensor, count: int) -> list[int]:
    """Give the tokens that follow a prompt [tokens] when the likeliest one is always taken."""
    decoder.reset()
    found = [decoder.run(prompt.tolist())]
    while len(found) < count:
        found.append(decoder.run(found[-1:]))
    return found


def prompt_tokens(source: Path, model: nn.Module) -> Tensor:
    """Give [tokens] int64 of an English text; random ones for a folder without tokenizer."""
    if (source / "tokenizer.json").exists() or (source / "tokenizer.model").exists():
        from gblm.model.loading import load_tokenizer

        ids: Tensor = load_tokenizer(source)(PROMPT, return_tensors="pt")["input_ids"][0]
        return ids
    vocabulary = int(ModelFolder.open(source).config["vocab_size"])
    return torch.randint(vocabulary, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(0))


@torch.inference_mode()
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
