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
NEVER_FREED = 1 << 60
FLOAT32 = 4
# Bytes per weight while a scored method has all its float32 matrices of the weight's size.
SCORE = {"magnitude": 8, "wanda": 8, "gradient": 12, "gblm": 20}
VARIANT = 28  # scores, sorted scores, their int64 order, sums
# ... while N:M ranks; while a threshold is sought: by value and index of what goes, and, over a
# whole matrix, by a pair per weight.
RANKS, THRESHOLD, PER_PRUNED, PAIR = 9, 6, 12, 16
# SparseGPT: weights, errors, drops, a copy being transposed, all float32.
SWEEP = 16
# Matrices of the Hessian's size that it is copied to, factored and inverted in.
FACTORS = 2
# ... while a weight is packed: indices of the kept ones, counts, comparisons. As here, so many bytes
# of those above are masks.
PACK, MASKS = 10, 4
# ... while a weight that is read is searched for NaN, beside the checkpoint's width.
SEARCH = 3
# Values per token, of the layer's hidden and its widest size, in a forward and a backward pass, and
# what a forward pass keeps for a backward one.
FORWARD, BACKWARD, KEPT = (8, 4), (24, 10), (12, 5)
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
        passes: of the text through each layer while pruning.
        sequential: a linear is observed and pruned just before it runs.
        in_memory: whether the inputs of one decoder layer, and those of all, stay in memory.
        resident: gradients are taken with all layers in memory.
        device: "cpu" or "cuda".
    """

    shapes: Shapes
    method: Method
    name: str
    pattern: Pattern
    collects: frozenset[str]
    reads: frozenset[str]
    passes: int
    sequential: bool
    in_memory: tuple[bool, bool]
    resident: bool
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
    terms = [Term("interpreter and libraries", psutil.Process().memory_info().rss, NEVER_FREED)]
    if setting.collects:
        terms += [Term("tokenizer and text", TEXT, NEVER_FREED)]
        terms += [Term("kernels", KERNELS, NEVER_FREED)]
    if setting.device != "cpu":
        terms += [Term("CUDA context", CONTEXT_RAM, NEVER_FREED)]
        terms += [Term("CUDA context", CONTEXT_CARD, NEVER_FREED, True)]
    return terms


def _frame(setting: Setting, always: list[Term], head: bool) -> list[Term]:
    frame, extra = setting.shapes.frame * setting.width, setting.shapes.head * setting.width
    terms = [*always, Term("embeddings and norms", frame, frame, True)]
    return [*terms, Term("head", extra or frame, extra or frame, True)] if head else terms


def _mapped(setting: Setting) -> list[Term]:
    """Pages of the embeddings' file, until the first decoder layer is read."""
    width = setting.shapes.stored_dtype.itemsize
    size = (setting.shapes.frame + setting.shapes.head) * width
    return [Term("mapped pages of the checkpoint", size, NEVER_FREED)]


def _reading(setting: Setting, layer: Layer) -> list[Term]:
    """Pages of a layer's file, and the search for NaN in its largest linear."""
    largest = max(linear.weights for linear in layer.linears)
    width = setting.shapes.stored_dtype.itemsize
    return [
        Term("mapped pages of the checkpoint", layer.stored, NEVER_FREED),
        Term("search for NaN", largest * (width + SEARCH), largest * width),
    ]


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
    """What one batch holds on its way through a layer; norms and statistics are in float32."""
    wide = max(max(linear.rows, linear.columns) for linear in layer.linears)
    values = tokens * (factors[0] * setting.shapes.hidden + factors[1] * wide)
    block = tokens * wide * FLOAT32
    name = "forward pass" if factors == FORWARD else "backward pass"
    return [Term(name, values * setting.width + 2 * block, block, True)]


def _matrices(name: str, linears: Iterable[Linear], *widths: int) -> list[Term]:
    """Matrices of the linears' sizes with so many bytes per weight."""
    return [Term(name, own.weights * width, own.weights * min(width, FLOAT32), True)
            for own in linears for width in widths]  # fmt: skip


def _gradients(setting: Setting, always: list[Term]) -> Iterator[Moment]:
    """All samples up and down, layer by layer; or each through all layers at once."""
    if setting.resident:
        yield _resident(setting, always)
        return
    shapes, layer = setting.shapes, setting.shapes.largest
    count, stays = len(shapes.layers), setting.in_memory[1]
    inputs = always + _activations(setting, count + 1, stays)
    alive, one = _layer(setting, layer), shapes.seq_len
    forward = _pass(setting, layer, FORWARD, one)
    yield Moment("gradients", "reading the last layer", inputs + alive + _reading(setting, layer))
    yield Moment("gradients", "forward", inputs + alive + forward)
    loss = [*always, *_activations(setting, count + 2, stays), _logits(setting)]
    yield Moment("gradients", "loss", loss)
    # The sums of the layer before are alive until those of this one are handed over.
    sums = _matrices("gradient norms", layer.pruned, *[FLOAT32] * min(count, 2))
    down = always + _activations(setting, max(count, 2), stays) + alive + sums
    backward = _pass(setting, layer, BACKWARD, one) + _fresh(setting, layer)
    yield Moment("gradients", "backward", down + backward)
    yield Moment("gradients", "reading a layer", down + _reading(setting, layer))


def _resident(setting: Setting, always: list[Term]) -> Moment:
    terms = list(always)
    for layer in setting.shapes.layers:
        terms += _layer(setting, layer) + _matrices("gradient norms", layer.pruned, FLOAT32)
        terms += _pass(setting, layer, KEPT, setting.shapes.seq_len)
    terms += [_logits(setting), *_fresh(setting, setting.shapes.largest)]
    return Moment("gradients", "loss", terms)


def _logits(setting: Setting) -> Term:
    logits = setting.shapes.seq_len * setting.shapes.vocab
    return Term("logits", logits * LOGIT, logits * FLOAT32, True)


def _fresh(setting: Setting, layer: Layer) -> list[Term]:
    largest = max(layer.pruned, key=lambda linear: linear.weights)
    return _matrices("gradient of one linear", [largest], setting.width, FLOAT32)


def _hessians(setting: Setting, groups: list[list[Linear]]) -> list[Term]:
    """Of linears by shared input; the activations' norms are too small to count."""
    if "hessian" not in setting.method.needs:
        return []
    return [_square("Hessians", group) for group in groups]


def _square(name: str, group: list[Linear], matrices: int = 1) -> Term:
    size = FLOAT32 * group[0].columns ** 2
    return Term(name, matrices * size, size, True)


def _from_file(setting: Setting, layer: Layer) -> list[Term]:
    """Gradient norms, of this run or another one, wait in host memory."""
    if "grad_norm" not in setting.method.needs:
        return []
    norms = _matrices("gradient norms", layer.pruned, FLOAT32)
    return [term._replace(on_device=False) for term in norms]


def _pruning(setting: Setting, always: list[Term]) -> Iterator[Moment]:
    shapes, layer = setting.shapes, setting.shapes.largest
    groups, more = layer.groups(pruned=True), _from_file(setting, layer)
    weights = _matrices("pruned weights and masks", layer.pruned, setting.width, 1)
    packed = Term("packed layer", layer.packed, max(own.packed for own in layer.pruned))
    factor = [_square("factor", groups[-1])] if setting.name == "sparsegpt" else []
    # Of the layer before: its statistics go when this one's come, the rest when it is packed.
    before = [*weights, packed] if len(shapes.layers) > 1 else []
    used = more + factor if before else []
    alive = always + _layer(setting, layer)
    yield Moment("pruning", "reading a layer", alive + before + used + _reading(setting, layer))
    observed = [] if setting.reads else _hessians(setting, layer.groups(pruned=False))
    step: list[Term] = []
    if setting.collects - {"grad_norm"}:
        step = _pass(setting, layer, FORWARD, shapes.tokens)
        seen = observed if not setting.sequential else []
        yield Moment("pruning", "observing", alive + before + used + seen + step)
    read = more + (_hessians(setting, groups) if setting.reads else [])
    if read:
        pages = Term("mapped pages of the statistics", sum(t.size for t in read), NEVER_FREED)
        waiting = observed if not setting.sequential else step
        yield Moment("pruning", "reading statistics", [*alive, *before, *waiting, *read, pages])
    on_the_way = step if setting.sequential else []
    yield from _choosing(setting, groups, alive + before + more + on_the_way)
    mapped = Term("mapped pages of the checkpoint", layer.stored, NEVER_FREED)
    now = [*alive, *weights, *more, *factor, packed, *([packed] if before else []), mapped]
    for group in groups:
        packing = _temporary("packing", group, PACK + 2 * shapes.stored_dtype.itemsize)
        host = [term._replace(on_device=False) for term in packing]
        yield Moment("pruning", "packing", now + host)


def _choosing(setting: Setting, groups: list[list[Linear]], alive: list[Term]) -> Iterator[Moment]:
    """Group after group is prepared and pruned; its statistics go, its weights come."""
    done: list[Linear] = []
    for index, group in enumerate(groups):
        later = [] if setting.sequential else _hessians(setting, groups[index + 1 :])
        now = alive + later + _matrices("pruned weights and masks", done, setting.width, 1)
        factor: list[Term] = []
        if setting.name == "sparsegpt":
            last = [_square("factor", groups[index - 1])] if index else []
            working = [*_hessians(setting, [group]), _square("factor", group, FACTORS), *last]
            yield Moment("pruning", "preparing", now + working)
            factor = [_square("factor", group)]
        work = _temporary("choosing", group, _per_weight(setting))
        own = _matrices("pruned weights and masks", group, setting.width, 1)
        yield Moment("pruning", "choosing", now + factor + work + own)
        done += group


def _temporary(name: str, group: list[Linear], width: int) -> list[Term]:
    """Matrices of the group's largest linear, some of them masks; so many bytes per weight."""
    largest = max(group, key=lambda linear: linear.weights)
    return _matrices(name, [largest], width - MASKS, *[1] * MASKS)


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
    shard = Term("pages of one shard", min(setting.shapes.output, SHARD_BYTES), NEVER_FREED)
    kept = _matrices("pruned weights and masks", layer.pruned, setting.width, 1)
    packed = Term("packed layer", layer.packed, max(own.packed for own in layer.pruned))
    return Moment("publishing", "writing a shard", [*always, *kept, packed, shard])
