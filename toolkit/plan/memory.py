"""Peak memory of a run: what is alive at each of its moments, in the order of the moments.

The moments follow gblm.prune, gblm.calibrate and the methods; where one of them comes to
hold more or less, a term changes here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from gblm.checkpoint.write import SHARD_BYTES
from gblm.plan import terms
from gblm.plan.setting import Setting
from gblm.plan.shapes import Linear
from gblm.plan.terms import HEAP_BLOCK, NEVER_FREED, Moment, Term


def moments(setting: Setting) -> Iterator[Moment]:
    """All moments that can be the peak, in order."""
    process = always = terms.process(setting)
    backward = "grad_norm" in setting.collects
    if backward:
        always = terms.frame(setting, process, head=True)
        yield Moment("gradients", "reading embeddings", always + terms.mapped(setting))
        yield from _gradients(setting, always)
    if setting.walks:
        # Embeddings are read again; where they are the head too, the old ones stay.
        always = terms.frame(setting, process, head=backward)
        always += terms.activations(setting, setting.streams)
        yield Moment("capture", "embedding the text", always + terms.mapped(setting))
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


def _by_name(held: Iterable[Term]) -> dict[str, int]:
    names: dict[str, int] = {}
    for term in held:
        names[term.name] = names.get(term.name, 0) + term.size
    return {name: size for name, size in names.items() if size}


def _gradients(setting: Setting, always: list[Term]) -> Iterator[Moment]:
    """All samples up and down, layer by layer; or each through all layers at once."""
    if setting.resident:
        yield _resident(setting, always)
        return
    shapes, layer = setting.shapes, setting.shapes.largest
    count, stays = len(shapes.layers), setting.in_memory[1]
    inputs = always + terms.activations(setting, count + 1, stays)
    alive, one = terms.decoder_layer(setting, layer), shapes.seq_len
    forward = terms.one_pass(setting, layer, terms.FORWARD, one)
    reading = terms.reading(setting, layer)
    yield Moment("gradients", "reading the last layer", inputs + alive + reading)
    yield Moment("gradients", "forward", inputs + alive + forward)
    loss = [*always, *terms.activations(setting, count + 2, stays), terms.logits(setting)]
    yield Moment("gradients", "loss", loss)
    # The sums of the layer before are alive until those of this one are handed over.
    sums = terms.matrices("gradient norms", layer.pruned, *[terms.FLOAT32] * min(count, 2))
    down = always + terms.activations(setting, max(count, 2), stays) + alive + sums
    backward = terms.one_pass(setting, layer, terms.BACKWARD, one)
    fresh = terms.fresh_gradient(setting, layer)
    yield Moment("gradients", "backward", down + backward + fresh)
    yield Moment("gradients", "reading a layer", down + reading)


def _resident(setting: Setting, always: list[Term]) -> Moment:
    """A sample at its loss: all layers, their sums, and what the backward pass needs of it."""
    held = list(always)
    for layer in setting.shapes.layers:
        held += terms.decoder_layer(setting, layer, ahead=False)
        held += terms.matrices("gradient norms", layer.pruned, terms.FLOAT32)
        held += terms.one_pass(setting, layer, terms.KEPT, setting.shapes.seq_len)
    held += [terms.logits(setting), *terms.fresh_gradient(setting, setting.shapes.largest)]
    return Moment("gradients", "loss", held)


def _pruning(setting: Setting, always: list[Term]) -> Iterator[Moment]:
    """One decoder layer, while things of the layer before are still there."""
    shapes, layer = setting.shapes, setting.shapes.largest
    groups, more = layer.groups(pruned=True), terms.gradient_norms(setting, layer)
    weights = terms.weights(setting, layer.pruned)
    packed = Term("packed layer", layer.packed, max(own.packed for own in layer.pruned))
    factor = terms.prepared(setting, groups[-1])
    # Of the layer before: its statistics go when this one's come, the rest when it is packed.
    before = [*weights, packed] if len(shapes.layers) > 1 else []
    used = more + factor if before else []
    alive = always + terms.decoder_layer(setting, layer)
    reading = terms.reading(setting, layer)
    yield Moment("pruning", "reading a layer", alive + before + used + reading)
    observed = [] if setting.reads else terms.hessians(setting, layer.groups(pruned=False))
    step: list[Term] = []
    if setting.walks:
        step = terms.one_pass(setting, layer, terms.FORWARD, shapes.tokens)
        seen = observed if not setting.sequential else []
        yield Moment("pruning", "observing", alive + before + used + seen + step)
    read = more + (terms.hessians(setting, groups) if setting.reads else [])
    if read:
        pages = Term("mapped pages of the statistics", sum(t.size for t in read), NEVER_FREED)
        waiting = observed if not setting.sequential else step
        yield Moment("pruning", "reading statistics", [*alive, *before, *waiting, *read, pages])
    on_the_way = step if setting.sequential else []
    yield from _choosing(setting, groups, alive + before + more + on_the_way)
    if setting.training is not None:
        trained = terms.training(setting, layer)
        yield Moment("pruning", "training", [*alive, *before, *weights, *trained])
    mapped = Term("mapped pages of the checkpoint", layer.stored, NEVER_FREED)
    now = [*alive, *weights, *more, *factor, packed, *([packed] if before else []), mapped]
    for group in groups:
        packing = terms.temporary("packing", group, terms.PACK + 2 * shapes.stored_dtype.itemsize)
        host = [term._replace(on_device=False) for term in packing]
        yield Moment("pruning", "packing", now + host)


def _choosing(setting: Setting, groups: list[list[Linear]], alive: list[Term]) -> Iterator[Moment]:
    """Group after group is prepared and pruned; its statistics go, its weights come."""
    done: list[Linear] = []
    for index, group in enumerate(groups):
        later = [] if setting.sequential else terms.hessians(setting, groups[index + 1 :])
        now = alive + later + terms.weights(setting, done)
        factor = terms.prepared(setting, group)
        if factor:
            own = [*terms.hessians(setting, [group]), terms.preparing(setting, group)]
            last = terms.prepared(setting, groups[index - 1]) if index else []
            yield Moment("pruning", "preparing", now + own + last)
        factor += [terms.inverting(setting, group)]
        work = terms.temporary("choosing", group, terms.choosing(setting, group))
        own = terms.weights(setting, group)
        yield Moment("pruning", "choosing", now + factor + work + own)
        done += group


def _publishing(setting: Setting, always: list[Term]) -> Moment:
    """A shard is a set of mapped files until it is written; the last layer is still there."""
    layer = setting.shapes.largest
    shard = Term("pages of one shard", min(setting.shapes.output, SHARD_BYTES), NEVER_FREED)
    kept = terms.weights(setting, layer.pruned)
    packed = Term("packed layer", layer.packed, max(own.packed for own in layer.pruned))
    head = terms.head(setting)
    return Moment("publishing", "writing a shard", [*always, *kept, packed, shard, *head])
