"""Peak memory of a run: what is alive at each of its moments, in the order of the moments.

The moments follow gblm.prune, gblm.loop, gblm.calibrate and the methods; where one of them comes to
hold more or less, a term changes here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil

from gblm.checkpoint.writer import SHARD_BYTES
from gblm.methods import Method
from gblm.patterns import NM, Pattern
from gblm.plan.shapes import Layer, Linear, Shapes

# Tokenizer, its library and the text; torch's own buffers and generated kernels.
TEXT, KERNELS = 70 << 20, 24 << 20
# A CUDA context with cuBLAS: of host memory, of the card.
CONTEXT_RAM, CONTEXT_CARD = 1 << 30, 512 << 20
# glibc gives larger blocks back when they are freed; smaller ones stay with the process.
HEAP_BLOCK = 32 << 20
FLOAT32 = 4
# Bytes per weight while a scored method has all its float32 matrices of the weight's size.
SCORE = {"magnitude": 8, "wanda": 8, "gradient": 12, "gblm": 20}
VARIANT = 28  # scores, sorted scores, their int64 order, sums
# ... while N:M ranks; while a threshold is sought: by value and index of what goes, and, over a
# whole matrix, by a pair per weight.
RANKS, THRESHOLD, PER_PRUNED, PAIR = 9, 6, 12, 16
# SparseGPT, float32: weights, errors, drops, a copy being transposed; Hessian, its copy, inverse.
SWEEP, FACTOR = 16, 12
# ... while a weight is packed: indices of the kept ones, counts, comparisons.
PACK = 10
# Values per token, of the layer's hidden and its widest size, in a forward and a backward pass.
FORWARD, BACKWARD = (8, 4), (24, 10)
# Bytes per logit in the loss of one sample and its gradient.
LOGIT = 16


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


@dataclass(frozen=True)
class Setting:
    """What a run does with the shapes.

    Attributes:
        shapes: of the model and the text.
        method: how weights are judged.
        name: of the method.
        pattern: which positions may stay.
        collects: statistics that the run takes on text.
        reads: statistics that another run saved.
        pruned_prefix: a layer sees the pruned layers' activations, at one more pass.
        in_memory: whether the inputs of one decoder layer, and those of all, stay in memory.
        device: "cpu" or "cuda".
    """

    shapes: Shapes
    method: Method
    name: str
    pattern: Pattern
    collects: frozenset[str]
    reads: frozenset[str]
    pruned_prefix: bool
    in_memory: tuple[bool, bool]
    device: str

    @property
    def width(self) -> int:
        """Bytes of a value in the computation."""
        return self.shapes.dtype.itemsize


def moments(setting: Setting) -> Iterator[Moment]:
    """All moments that can be the peak, in order."""
    always = _always(setting)
    backward = "grad_norm" in setting.collects
    if backward:
        frame = _frame(setting, always, head=True)
        yield Moment("gradients", "reading embeddings and head", frame + _mapped(setting))
        yield from _gradients(setting, frame)
        always = frame
    if setting.collects - {"grad_norm"}:
        # Embeddings are read again; where they are the head too, the old ones stay.
        frame = _frame(setting, _always(setting), head=backward)
        always = frame + _activations(setting)
        yield Moment("capture", "embedding the text", always + _mapped(setting))
    yield from _pruning(setting, always)
    yield _publishing(setting, always)


def peaks(setting: Setting) -> list[dict[str, Any]]:
    """The highest moment of each phase, in bytes, as plain JSON types.

    Small blocks count at the highest total that they have had so far.
    """
    phases: dict[str, dict[str, Any]] = {}
    heap = 0
    for moment in moments(setting):
        off = [term for term in moment.terms if term.on_device and setting.device != "cpu"]
        here = [term for term in moment.terms if term not in off]
        small = sum(term.size for term in here if term.block < HEAP_BLOCK)
        heap = max(heap, small)
        names = _by_name(here)
        if heap > small:
            names["freed, kept by the allocator"] = heap - small
        ram, card = sum(names.values()), sum(term.size for term in off)
        phase = phases.setdefault(moment.phase, {"phase": moment.phase, "ram_bytes": 0})
        if ram > phase["ram_bytes"]:
            phase |= {"ram_bytes": ram, "at": moment.name, "ram_terms": names}
        if off and card > phase.get("gpu_bytes", 0):
            phase |= {"gpu_bytes": card, "gpu_at": moment.name, "gpu_terms": _by_name(off)}
    return list(phases.values())


def _by_name(terms: Iterable[Term]) -> dict[str, int]:
    names: dict[str, int] = {}
    for term in terms:
        names[term.name] = names.get(term.name, 0) + term.size
    return {name: size for name, size in names.items() if size}


def _always(setting: Setting) -> list[Term]:
    """What a run holds from its first moment to its last."""
    terms = [Term("interpreter and libraries", psutil.Process().memory_info().rss, 1 << 40)]
    if setting.collects:
        terms += [Term("tokenizer and text", TEXT, 1 << 40)]
        terms += [Term("kernels", KERNELS, 1 << 40)]
    if setting.device != "cpu":
        terms += [Term("CUDA context", CONTEXT_RAM, 1 << 40)]
        terms += [Term("CUDA context", CONTEXT_CARD, 1 << 40, True)]
    return terms


def _frame(setting: Setting, always: list[Term], head: bool) -> list[Term]:
    frame, extra = setting.shapes.frame * setting.width, setting.shapes.head * setting.width
    terms = [*always, Term("embeddings and norms", frame, frame, True)]
    return [*terms, Term("head", extra or frame, extra or frame, True)] if head else terms


def _mapped(setting: Setting) -> list[Term]:
    """Pages of the embeddings' file, until the first decoder layer is read."""
    size = (setting.shapes.frame + setting.shapes.head) * setting.shapes.stored_dtype.itemsize
    return [Term("mapped pages of the checkpoint", size, 1 << 40)]


def _activations(setting: Setting, layers: int = 1, in_memory: bool | None = None) -> list[Term]:
    """Hidden states at the inputs of so many decoder layers, and one batch where it computes."""
    shapes = setting.shapes
    stays = setting.in_memory[0] if in_memory is None else in_memory
    size = layers * shapes.hidden_states(shapes.samples) if stays else 0
    batch = shapes.hidden_states(shapes.batch)
    terms = [Term("activations", size, batch)]
    return (
        terms if stays and setting.device == "cpu" else [*terms, Term("batch", batch, batch, True)]
    )


def _layer(setting: Setting, layer: Layer) -> list[Term]:
    """A decoder layer on the device; for a GPU the next one waits in pinned memory."""
    size = layer.parameters * setting.width
    block = max(linear.weights for linear in layer.linears) * setting.width
    terms = [Term("decoder layer", size, block, True)]
    return (
        terms if setting.device == "cpu" else [*terms, Term("next decoder layers", 2 * size, block)]
    )


def _pass(setting: Setting, layer: Layer, factors: tuple[int, int], tokens: int) -> list[Term]:
    wide = max(max(linear.rows, linear.columns) for linear in layer.linears)
    values = tokens * (factors[0] * setting.shapes.hidden + factors[1] * wide)
    # Norms and statistics are taken in float32.
    block = tokens * wide * FLOAT32
    return [Term("forward pass" if factors is FORWARD else "backward pass",
                 values * setting.width + 2 * block, block, True)]  # fmt: skip


def _matrices(name: str, linears: Iterable[Linear], *widths: int) -> list[Term]:
    """Matrices of the linears' sizes with so many bytes per weight."""
    return [Term(name, own.weights * width, own.weights * min(width, FLOAT32), True)
            for own in linears for width in widths]  # fmt: skip


def _gradients(setting: Setting, always: list[Term]) -> Iterator[Moment]:
    shapes, layer = setting.shapes, setting.shapes.largest
    count, stays = len(shapes.layers), setting.in_memory[1]
    always = always + _layer(setting, layer)
    inputs = always + _activations(setting, count + 1, stays)
    one = shapes.seq_len
    mapped = Term("mapped pages of the checkpoint", layer.stored, 1 << 40)
    yield Moment("gradients", "reading the last layer", [*inputs, mapped])
    yield Moment("gradients", "forward", inputs + _pass(setting, layer, FORWARD, one))
    logits = one * shapes.vocab
    loss = Term("logits", logits * LOGIT, logits * FLOAT32, True)
    yield Moment("gradients", "loss", [*always, *_activations(setting, count + 2, stays), loss])
    # The sums of the layer before are alive until those of this one are handed over.
    sums = _matrices("gradient norms", layer.pruned, *[FLOAT32] * min(count, 2))
    down = always + _activations(setting, max(count, 2), stays) + sums
    largest = max(layer.pruned, key=lambda linear: linear.weights)
    fresh = _matrices("gradient of one linear", [largest], setting.width, FLOAT32)
    yield Moment("gradients", "backward", down + _pass(setting, layer, BACKWARD, one) + fresh)
    yield Moment("gradients", "reading a layer", [*down, mapped])


def _statistics(setting: Setting, groups: list[list[Linear]]) -> list[Term]:
    """Of linears by shared input; the activations' norms are too small to count."""
    terms = []
    wanted = setting.collects | setting.reads
    for group in groups:
        if "hessian" in wanted:
            size = FLOAT32 * group[0].columns ** 2
            terms.append(Term("Hessians", size, size, True))
        if "grad_norm" in wanted:
            # They come from a file and stay in host memory until they are used.
            terms += [t._replace(on_device=False)
                      for t in _matrices("gradient norms", group, FLOAT32)]  # fmt: skip
    return terms


def _pruning(setting: Setting, always: list[Term]) -> Iterator[Moment]:
    shapes, layer = setting.shapes, setting.shapes.largest
    mapped = Term("mapped pages of the checkpoint", layer.stored, 1 << 40)
    again = len(shapes.layers) > 1
    largest = max(linear.packed for linear in layer.pruned)
    packed = Term("packed layer", layer.packed, largest)
    before = [packed] if again else []
    alive = always + _layer(setting, layer) + before
    kept = _matrices("pruned weights and masks", layer.pruned, setting.width, 1) if again else []
    yield Moment("pruning", "reading a layer", [*alive, *kept, mapped])
    stats = _statistics(setting, layer.groups(pruned="hessian" not in setting.collects))
    hessians = [term for term in stats if term.name == "Hessians"]
    if setting.collects - {"grad_norm"}:
        step = _pass(setting, layer, FORWARD, shapes.tokens)
        yield Moment("pruning", "observing", alive + kept + hessians + step)
    if len(stats) > len(hessians) or setting.reads:
        size = sum(term.size for term in stats if setting.reads or term.name != "Hessians")
        pages = Term("mapped pages of the statistics", size, 1 << 40)
        yield Moment("pruning", "reading statistics", [*alive, *kept, *stats, pages])
    yield from _choosing(setting, layer, alive + kept)
    done = _matrices("pruned weights and masks", layer.pruned, setting.width, 1)
    one = max(layer.pruned, key=lambda linear: linear.weights)
    width = shapes.stored_dtype.itemsize
    packing = [t._replace(on_device=False)
               for t in _matrices("packing", [one], PACK, 2 * width)]  # fmt: skip
    yield Moment("pruning", "packing", [*alive, *done, packed, *packing, mapped])


def _choosing(setting: Setting, layer: Layer, alive: list[Term]) -> Iterator[Moment]:
    """Group after group is prepared and pruned; its statistics go, its weights come."""
    groups = layer.groups(pruned=True)
    done: list[Linear] = []
    for index, group in enumerate(groups):
        rest = _statistics(setting, groups[index + 1 :])
        finished = _matrices("pruned weights and masks", done, setting.width, 1)
        own = _statistics(setting, [group])
        if setting.name == "sparsegpt":
            size = FLOAT32 * group[0].columns ** 2
            factor = Term("factor", FACTOR * group[0].columns ** 2 - size, size, True)
            yield Moment("pruning", "preparing", [*alive, *rest, *finished, *own, factor])
            own = [Term("factor", size, size, True)]
        largest = max(group, key=lambda linear: linear.weights)
        work = _matrices("choosing", [largest], _per_weight(setting))
        now = _matrices("pruned weights and masks", group, setting.width, 1)
        yield Moment("pruning", "choosing", [*alive, *rest, *finished, *own, *work, *now])
        done += group


def _per_weight(setting: Setting) -> int:
    """Bytes per weight while a matrix is judged, beside the result."""
    if setting.name == "sparsegpt":
        return SWEEP
    if setting.name == "wanda" and getattr(setting.method, "variant", False):
        return VARIANT
    choose = RANKS
    if not isinstance(setting.pattern, NM):
        choose = THRESHOLD + int(PER_PRUNED * setting.pattern.sparsity)
        choose += PAIR if setting.method.scope == "matrix" else 0
    return max(SCORE[setting.name], choose)


def _publishing(setting: Setting, always: list[Term]) -> Moment:
    """A shard is a set of mapped files until it is written; the last layer is still there."""
    layer = setting.shapes.largest
    shard = Term("pages of one shard", min(setting.shapes.output, SHARD_BYTES), 1 << 40)
    kept = _matrices("pruned weights and masks", layer.pruned, setting.width, 1)
    packed = Term("packed layer", layer.packed, max(own.packed for own in layer.pruned))
    return Moment("publishing", "writing a shard", [*always, *kept, packed, shard])
