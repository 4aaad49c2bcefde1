"""Terms: what a run holds in memory, each as bytes from shapes.

The numbers per weight, token and logit follow gblm.calibrate, the methods and the formats; where
one of them comes to hold more or less, a number changes here.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import psutil

from gblm.plan.setting import Setting
from gblm.plan.shapes import Layer, Linear
from gblm.sparse.patterns import NM, Dense, Pattern

# Tokenizer, its library and the text; torch's own buffers and generated kernels.
TEXT, KERNELS = 70 << 20, 24 << 20
# A CUDA context with cuBLAS: of host memory, of the card.
CONTEXT_RAM, CONTEXT_CARD = 1 << 30, 512 << 20
# glibc gives larger blocks back when they are freed; smaller ones stay with the process.
HEAP_BLOCK = 32 << 20
NEVER_FREED = 1 << 60
FLOAT32 = 4
# Bytes per weight while a scored method has all its float32 matrices of the weight's size.
SCORE = {"magnitude": 8, "wanda": 8, "ria": 16, "gradient": 12, "gblm": 20}
VARIANT = 28  # scores, sorted scores, their int64 order, sums
# ... while N:M ranks; while a threshold is sought: by value and index of what goes, and, over a
# whole matrix, by a pair per weight.
RANKS, THRESHOLD, PER_PRUNED, PAIR = 9, 6, 12, 16
# SparseGPT: weights, errors, drops, a copy being transposed, all float32.
SWEEP = 16
# DSnoT: scores, expected errors, gains, and copies of them under a condition; ALPS: dense weights,
# their image, D, V and B + V/ρ, and a square of them, from which the pattern chooses.
EXCHANGE, ADMM = 28, 24
# ... what ALPS holds while it ends with a Refit of its own.
OWN_REFIT = 16
# Rounding to codes: weights and their absolutes in float32, beside the weights that are rounded.
ROUND = 8
# Refit: targets, starts, masks, results, residuals, directions, images and copies of them.
REFIT = 40
# Reconstruction: trained weights, their gradients and Adam's two moments; on a GPU its roots of all
# weights at once. What rounding keeps for its backward pass: scales, quotients, codes.
TRAINED, ROOTS, ROUNDED = 16, 4, 12
# Matrices of the Hessian's size beside it: while the method prepares, those that it leaves for
# pruning, and more while it prunes. SparseGPT factors and inverts; ALPS decomposes, and inverts
# anew for every ρ.
PREPARING = {"sparsegpt": 2, "alps": 5}
PREPARED = {"sparsegpt": 1, "alps": 2}
INVERTING = {"alps": 2}
# ... while a weight is packed: indices of the kept ones, counts, comparisons. Masks are so much of
# it, and of choosing.
PACK, MASKS = 10, 4
# ... while a weight that is read is searched for NaN, beside the checkpoint's width.
SEARCH = 3
# Values per token, of the layer's hidden and its widest size, in a forward and a backward pass, and
# what a forward pass keeps for a backward one.
FORWARD, BACKWARD, KEPT = (8, 4), (24, 10), (9, 4)
# Bytes per logit in the loss of one sample and its gradient.
LOGIT = 12


class Term(NamedTuple):
    """Something in memory: bytes in all, bytes of each block, and whether layers compute there."""

    name: str
    size: int
    block: int
    on_device: bool = False


class Moment(NamedTuple):
    """Everything that is alive at one point of a run."""

    phase: str
    name: str
    terms: list[Term]


def process(setting: Setting) -> list[Term]:
    """What a run holds from its first moment to its last."""
    own = psutil.Process().memory_info().rss
    terms = [Term("interpreter and libraries", own, NEVER_FREED)]
    if setting.shapes.samples:
        terms += [Term("tokenizer and text", TEXT, NEVER_FREED)]
        terms += [Term("kernels", KERNELS, NEVER_FREED)]
    if setting.device != "cpu":
        terms += [Term("CUDA context", CONTEXT_RAM, NEVER_FREED)]
        terms += [Term("CUDA context", CONTEXT_CARD, NEVER_FREED, True)]
    return terms


def frame(setting: Setting, always: list[Term], head: bool) -> list[Term]:
    """More than `always`: what is outside the decoder layers; a tied head counts once more."""
    size, extra = setting.shapes.frame * setting.width, setting.shapes.head * setting.width
    terms = [*always, Term("embeddings and norms", size, size, True)]
    return [*terms, Term("head", extra or size, extra or size, True)] if head else terms


def mapped(setting: Setting) -> list[Term]:
    """Pages of the embeddings' file, until the first decoder layer is read."""
    width = setting.shapes.stored_dtype.itemsize
    size = (setting.shapes.frame + setting.shapes.head) * width
    return [Term("mapped pages of the checkpoint", size, NEVER_FREED)]


def reading(setting: Setting, layer: Layer) -> list[Term]:
    """Pages of a layer's file, and the search for NaN in its largest linear."""
    largest = max(linear.weights for linear in layer.linears)
    width = setting.shapes.stored_dtype.itemsize
    return [
        Term("mapped pages of the checkpoint", layer.stored, NEVER_FREED),
        Term("search for NaN", largest * (width + SEARCH), largest * width),
    ]


def activations(setting: Setting, layers: int = 1, in_memory: bool | None = None) -> list[Term]:
    """Hidden states at the inputs of so many decoder layers, and one batch where it computes."""
    shapes = setting.shapes
    stays = setting.in_memory[0] if in_memory is None else in_memory
    size = layers * shapes.hidden_states(shapes.samples) if stays else 0
    batch = shapes.hidden_states(shapes.batch)
    terms = [Term("activations", size, batch)]
    if not stays or setting.device != "cpu":
        terms.append(Term("batch", batch, batch, True))
    return terms


def decoder_layer(setting: Setting, layer: Layer, ahead: bool = True) -> list[Term]:
    """A decoder layer on the device; for a GPU the next one waits in pinned memory if `ahead`."""
    size = layer.parameters * setting.width
    block = max(linear.weights for linear in layer.linears) * setting.width
    terms = [Term("decoder layer", size, block, True)]
    if ahead and setting.device != "cpu":
        terms.append(Term("next decoder layers", 2 * size, block))
    return terms


def one_pass(setting: Setting, layer: Layer, factors: tuple[int, int], tokens: int) -> list[Term]:
    """What tokens hold on their way through a layer, or leave there if `factors` is KEPT."""
    wide = max(max(linear.rows, linear.columns) for linear in layer.linears)
    size = tokens * (factors[0] * setting.shapes.hidden + factors[1] * wide) * setting.width
    block = tokens * wide * FLOAT32
    if factors == KEPT:
        return [Term("kept for the backward pass", size, block, True)]
    # Norms and statistics are taken in float32.
    name = "forward pass" if factors == FORWARD else "backward pass"
    return [Term(name, size + 2 * block, block, True)]


def matrices(name: str, linears: Iterable[Linear], *widths: int) -> list[Term]:
    """Matrices of the linears' sizes with so many bytes per weight."""
    return [Term(name, own.weights * width, own.weights * min(width, FLOAT32), True)
            for own in linears for width in widths]  # fmt: skip


def weights(setting: Setting, linears: Iterable[Linear]) -> list[Term]:
    """What was chosen: weights, masks, and codes if there are any."""
    every, name = list(linears), "pruned weights and masks"
    rounded = [own for own in every if own.choice and not own.choice.values.is_float]
    return matrices(name, every, setting.width, 1) + matrices(name, rounded, 1)


def head(setting: Setting) -> list[Term]:
    """Codes of the output head, and the file's pages of what they are made from."""
    found = setting.shapes.packed_head
    if found is None:
        return []
    pages = found.weights * found.dtype.itemsize
    return [
        Term("packed head", found.num_bytes, found.num_bytes),
        Term("mapped pages of the checkpoint", pages, NEVER_FREED),
    ]


def logits(setting: Setting) -> Term:
    """Of one sample, in its loss and the loss's gradient."""
    count = setting.shapes.seq_len * setting.shapes.vocab
    return Term("logits", count * LOGIT, count * FLOAT32, True)


def fresh_gradient(setting: Setting, layer: Layer) -> list[Term]:
    """Of one linear, as it comes and in float32, until it is added to its sum."""
    largest = max(layer.pruned, key=lambda linear: linear.weights)
    return matrices("gradient of one linear", [largest], setting.width, FLOAT32)


def hessians(setting: Setting, groups: list[list[Linear]]) -> list[Term]:
    """Of linears by shared input; the activations' norms are too small to count."""
    if "hessian" not in setting.pipeline.needs:
        return []
    return [square("Hessians", group) for group in groups]


def square(name: str, group: list[Linear], count: int = 1) -> Term:
    """Float32 matrices [in, in] for linears with the same input."""
    size = FLOAT32 * group[0].columns ** 2
    return Term(name, count * size, size, True)


def prepared(setting: Setting, group: list[Linear]) -> list[Term]:
    """What the steps made of a group's Hessian, which Refit reads itself."""
    count = PREPARED.get(setting.name, 0) + int(setting.factors)
    count += int(setting.pipeline.refit is not None)
    return [square("factor", group, count)] if count else []


def preparing(setting: Setting, group: list[Linear]) -> Term:
    """Beside the Hessian, while the method, and rounding after it, prepare."""
    rounding = PREPARED.get(setting.name, 0) + PREPARING["sparsegpt"] if setting.factors else 0
    return square("factor", group, max(PREPARING.get(setting.name, 0), rounding))


def inverting(setting: Setting, group: list[Linear]) -> Term:
    """Beside what was prepared, while a linear is pruned: ALPS's inverses, Refit's damped copy."""
    refit = int(setting.pipeline.refit is not None)
    return square("inverse", group, max(INVERTING.get(setting.name, 0), refit))


def gradient_norms(setting: Setting, layer: Layer) -> list[Term]:
    """Gradient norms, of this run or another one, wait in host memory."""
    if "grad_norm" not in setting.method.needs:
        return []
    norms = matrices("gradient norms", layer.pruned, FLOAT32)
    return [term._replace(on_device=False) for term in norms]


def training(setting: Setting, layer: Layer) -> list[Term]:
    """A step of a decoder layer's reconstruction, at the end of its backward pass."""
    how, shapes = setting.training, setting.shapes
    if how is None:
        return []
    tokens = min(how.batch_size, shapes.samples) * shapes.seq_len
    rounded = [own for own in layer.pruned if own.choice and not own.choice.values.is_float]
    pair = shapes.hidden_states(min(how.batch_size, shapes.samples))
    error = tokens * shapes.hidden * FLOAT32
    return [
        *matrices("trained weights", layer.pruned, *[FLOAT32] * (TRAINED // FLOAT32)),
        *matrices("weights of a step", layer.pruned, setting.width),
        *matrices("rounding of a step", rounded, *[FLOAT32] * (ROUNDED // FLOAT32)),
        *(matrices("roots of Adam", layer.pruned, ROOTS) if setting.device != "cpu" else []),
        *fresh_gradient(setting, layer),
        *one_pass(setting, layer, BACKWARD, tokens),
        Term("samples of a step", 2 * pair + 4 * error, error, True),
    ]


def temporary(name: str, group: list[Linear], width: int) -> list[Term]:
    """Matrices of the group's largest linear, some of them masks; so many bytes per weight."""
    largest = max(group, key=lambda linear: linear.weights)
    return matrices(name, [largest], width - MASKS, *[1] * MASKS)


def choosing(setting: Setting, group: list[Linear]) -> int:
    """Bytes per weight while a matrix is judged and rounded to codes, beside the result."""
    pipeline, choices = setting.pipeline, [own.choice for own in group if own.choice]
    rounded = any(not choice.values.is_float for choice in choices)
    rounding = SWEEP if pipeline.rounding == "obs" else ROUND
    sparse = [choice.pattern for choice in choices if not isinstance(choice.pattern, Dense)]
    return max(
        setting.width + rounding if rounded else 0,
        setting.width + REFIT if sparse and pipeline.refit is not None else 0,
        *(_judging(setting, pattern) for pattern in sparse),
        0,
    )


def _judging(setting: Setting, pattern: Pattern) -> int:
    if setting.name == "sparsegpt":
        return SWEEP
    if setting.name == "dsnot":
        return EXCHANGE
    if setting.name == "wanda" and getattr(setting.method, "variant", False):
        return VARIANT
    choose = RANKS
    if not isinstance(pattern, NM):
        choose = THRESHOLD + int(PER_PRUNED * pattern.sparsity)
        choose += PAIR if setting.method.scope == "matrix" or setting.name == "alps" else 0
    if setting.name == "alps":
        return max(ADMM + choose, OWN_REFIT + REFIT)
    return max(SCORE[setting.name], choose)
