"""What can be exported: for each target the precisions that ONNX Runtime runs, and why no others.

The refusals were measured with ONNX Runtime 1.31 and 1.32 and its model builder 0.18.
"""

from __future__ import annotations

from dataclasses import dataclass

from gblm.errors import UsageError
from gblm.export.onnx_model.runtime import CPU, CUDA


@dataclass(frozen=True)
class Target:
    """Where a graph is to run.

    Attributes:
        provider: the execution provider that must run it.
        precisions: of weights and activations, the default first.
        builder: the model builder's name for it; None: `torch.onnx.export` makes the graph.
    """

    provider: str
    precisions: tuple[str, ...]
    builder: str | None


TARGETS = {
    "cpu": Target(CPU, ("fp32", "int8", "int4"), "cpu"),
    "cuda": Target(CUDA, ("fp16", "bf16", "fp32", "int8", "int4"), "cuda"),
    "portable": Target(CPU, ("fp32",), None),
}
REFUSED = {
    (
        "cpu",
        "fp16",
    ): "the model builder's float16 graph for CPU fails there on its shapes",
    ("cpu", "bf16"): "its CPU provider has no MatMul for bfloat16",
    ("portable", "fp16"): "its CPU provider, which must run it, widens float16 at every operator",
    ("portable", "bf16"): "its CPU provider, which must run it, has no MatMul for bfloat16",
    ("portable", "int8"): "pure ai.onnx has no operator for weights of 8 bits; use --target cpu",
    ("portable", "int4"): "pure ai.onnx has no operator for weights of 4 bits; use --target cpu",
}


def check_target(target: str, precision: str | None, sparse: bool) -> str:
    """The precision to export in.

    Args:
        target: a name of TARGETS.
        precision: a name, or None for the target's default.
        sparse: whether weights are to stay packed.

    Raises:
        UsageError: ONNX Runtime cannot run the combination; the reason stands in the message.
    """
    if target not in TARGETS:
        raise UsageError(f"--target {target!r} is unknown: choose from {', '.join(TARGETS)}.")
    known = TARGETS[target].precisions
    chosen = precision or known[0]
    if chosen not in known:
        reason = REFUSED.get((target, chosen), "there is no such precision")
        raise UsageError(
            f"--target {target} --precision {chosen}: ONNX Runtime cannot run it: {reason}. "
            f"Choose from {', '.join(known)}."
        )
    if sparse and target == "cuda":
        raise UsageError(
            "--sparse --target cuda: the operator has no CUDA kernel yet, and would copy every "
            "activation to the CPU and back. Export with --target cpu, or without --sparse."
        )
    if sparse and target == "portable":
        raise UsageError(
            "--sparse --target portable: packed weights need the operator ai.gblm::Linear, which "
            "is not portable. Use --target cpu."
        )
    if sparse and chosen != "fp32":
        raise UsageError(
            f"--sparse --precision {chosen}: packed weights keep the checkpoint's own values; "
            "--precision is that of the activations, fp32. For integer values prune with "
            f"--values {chosen if chosen.startswith('int') else 'int8'}."
        )
    return chosen
