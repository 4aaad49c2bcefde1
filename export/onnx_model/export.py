"""`gblm export onnx`: a graph, its weights, what stands beside them, and proof that it is right."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gblm import packed
from gblm.checkpoint.write import check_output, copy_side_files, new_folder
from gblm.errors import GateError, InputError, MachineError, UsageError
from gblm.export.dense import export_dense
from gblm.export.onnx_model.build import build, build_portable
from gblm.export.onnx_model.rewrite import Replaced, pack_graph
from gblm.export.onnx_model.runtime import (
    CONFIG_FILE,
    CPU,
    CUDA,
    DOMAIN,
    MODEL_FILE,
    REPORT_FILE,
    check_installation,
    library,
)
from gblm.export.onnx_model.storage import DATA_FILE, count_zeros
from gblm.export.onnx_model.validate import TOLERANCES, Tolerance, validate
from gblm.files import read_json, write_json
from gblm.model import loading
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
from gblm.model.reader import Reader
from gblm.progress import Progress, no_progress
from gblm.provenance import provenance

LIBRARY_FILE = "libgblm_ort.so"
# transformers' own default, which older readers take when the old key is missing.
DEFAULT_THETA = 10000.0


@dataclass(frozen=True)
class Target:
    """Where a graph is to run.

    Attributes:
        provider: the execution provider that must run it.
        precisions: of weights and activations, the default first.
        lacks: why there are no others; measured with ONNX Runtime 1.31 and 1.32, builder 0.18.
        builder: the model builder's name for it; None: `torch.onnx.export` makes the graph.
    """

    provider: str
    precisions: tuple[str, ...]
    lacks: str
    builder: str | None


TARGETS = {
    "cpu": Target(
        CPU, ("fp32", "int8", "int4"),
        "its CPU provider fails on the shapes of the model builder's float16 graph, and has no "
        "MatMul for bfloat16", "cpu",
    ),
    "cuda": Target(
        CUDA, ("fp16", "bf16", "fp32", "int8", "int4"), "there is no such precision", "cuda"
    ),
    "portable": Target(
        CPU, ("fp32",),
        "pure ai.onnx has no operator for codes (use --target cpu), and its CPU provider, which "
        "must run the graph, widens float16 at every operator and has no MatMul for bfloat16", None,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Wanted:
    """What to export.

    Attributes:
        target: a name of TARGETS.
        precision: of the graph; None for the target's default.
        sparse: keep the weights packed, for the operator ai.gblm::Linear.
        validate: tokens to compare with the original; 0 leaves it out.
        min_agreement: least top-1 agreement, instead of the precision's own.
    """

    target: str = "cpu"
    precision: str | None = None
    sparse: bool = False
    validate: int = 64
    min_agreement: float | None = None


def export_onnx(
    source: str | Path,
    output: Path,
    wanted: Wanted | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Write a model folder for ONNX Runtime.

    Args:
        source: a packed or dense folder, or a hub id.
        output: the folder to make.
        wanted: the target, precision and validation.
        overwrite: replace an existing folder.
        progress: for a progress bar.

    Returns:
        The report, which also lies in the folder.

    Raises:
        UsageError: ONNX Runtime cannot run what is asked for.
        InputError: the model cannot be exported so.
        MachineError: a package is missing, or the disk is full.
        GateError: the export differs from the original more than it may; it is written all the
            same, with its report.
    """
    wanted = wanted or Wanted()
    precision = check_target(wanted.target, wanted.precision, wanted.sparse)
    check_installation("onnx", *_makers(wanted.target))
    folder = ModelFolder.open(source)
    if wanted.sparse:
        _check_sparse(folder)
    if wanted.validate and wanted.target == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "--target cuda: there is no CUDA device here to validate the export on; --validate 0 "
            "writes it unproven."
        )
    check_output(output, overwrite, _needed_bytes(folder), folder.path)
    step = progress("exporting", 2 + bool(wanted.validate))
    with new_folder(output, overwrite) as made:
        replaced = _make(folder, made, wanted, precision)
        step()
        _complete(folder, made, wanted.sparse)
        report = _report(folder.path, made, wanted, precision, replaced)
        step()
        if wanted.validate:
            model = _original(folder)
            provider = TARGETS[wanted.target].provider
            tolerance = _tolerance(wanted, precision, replaced)
            report["validation"] = validate(
                model, folder.path, made, provider, wanted.validate, tolerance
            )
            step()
        write_json(made / REPORT_FILE, report)
    _judge(report, output)
    return report


def check_target(target: str, precision: str | None, sparse: bool) -> str:
    """Choose the precision to export in.

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
        raise UsageError(
            f"--target {target} --precision {chosen}: ONNX Runtime cannot run it: "
            f"{TARGETS[target].lacks}. Choose from {', '.join(known)}."
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


def _makers(target: str) -> tuple[str, ...]:
    """Name what must be installed to make the graph."""
    if TARGETS[target].builder is None:
        return ("onnxscript",)
    return () if importlib.util.find_spec("onnxruntime_genai") else ("onnxruntime-genai",)


def _check_sparse(folder: ModelFolder) -> None:
    if folder.kind != "packed":
        raise InputError(
            f"{folder} is not packed, so --sparse has nothing to keep: prune it with `gblm prune`, "
            f"or pack zeros that are there with `gblm export pack {folder} --output OUT`."
        )
    library()


def _needed_bytes(folder: ModelFolder) -> int:
    """Count the bytes of the graph in float32 and of the unpacked copy that it is made from."""
    with PackedReader(folder) if folder.kind == "packed" else Reader(folder) as reader:
        if isinstance(reader, PackedReader):
            weights = sum(
                rows * columns for rows, columns in (x.shape for x in reader.linears.values())
            )
            weights += sum(reader.num_bytes(name) // 2 for name in reader.dense_names())
            return 4 * weights + 4 * weights
        return 2 * sum(map(reader.num_bytes, reader))


def _make(folder: ModelFolder, made: Path, wanted: Wanted, precision: str) -> list[Replaced]:
    """Write the graph and its data; tell what was replaced in it."""
    target = TARGETS[wanted.target]
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=".onnx-") as name:
        work, dense = Path(name), folder.path
        if folder.kind == "packed":
            dense = work / "dense"
            export_dense(folder, dense, dtype=torch.float32)
        if target.builder is None:
            build_portable(loading.load(dense, dtype=torch.float32), made)
            return []
        if not wanted.sparse:
            build(dense, made, precision, target.builder)
            return []
        built = work / "built"
        build(dense, built, precision, target.builder)
        replaced = pack_graph(built, folder, made)
        for file in built.iterdir():
            if file.name not in (MODEL_FILE, DATA_FILE):
                (made / file.name).write_bytes(file.read_bytes())
        return replaced


def _original(folder: ModelFolder) -> nn.Module:
    """Load what an export is held against: the torch model in float32, weights as stored."""
    if folder.kind == "packed":
        model: nn.Module = packed.load(folder, backend="dense", dtype=torch.float32)
        return model
    return loading.load(folder, dtype=torch.float32)


def _complete(source: ModelFolder, folder: Path, sparse: bool) -> None:
    """Add what the graph's maker leaves out: tokenizer, config.json, the operator's library."""
    copy_side_files(source.path, folder)
    config = {key: v for key, v in source.config.items() if key != "quantization_config"}
    write_json(folder / "config.json", with_rope_theta(config))
    about = read_json(folder / CONFIG_FILE)
    decoder = about["model"]["decoder"]
    _settle_head_size(folder / MODEL_FILE, decoder["head_size"])
    if sparse:
        shutil.copyfile(library(), folder / LIBRARY_FILE)
        # onnxruntime-genai looks for it beside the graph, so that the folder may be moved.
        decoder["session_options"]["custom_ops_library"] = LIBRARY_FILE
        write_json(folder / CONFIG_FILE, about)


def _settle_head_size(path: Path, head_size: int) -> None:
    """Give keys and values their last dimension as a number, which the model builder only names.

    lm-eval's `onnxruntime` backend takes a name for 1.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = head_size
    path.write_bytes(model.SerializeToString())


def with_rope_theta(config: dict[str, Any]) -> dict[str, Any]:
    """Write the rotary base in both spellings: transformers 5 writes `rope_parameters` alone.

    Readers of the old key silently take 10000 for a missing one.
    """
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        return config | {"rope_theta": parameters["rope_theta"]}
    theta = config.get("rope_theta", DEFAULT_THETA)
    return config | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def _tolerance(wanted: Wanted, precision: str, replaced: list[Replaced]) -> Tolerance:
    name = precision
    if wanted.sparse:
        codes = any("/int" in one.spec for one in replaced)
        name = "sparse-int" if codes else "sparse"
    found = TOLERANCES[name]
    if wanted.min_agreement is None:
        return found
    return Tolerance(found.logit_difference, wanted.min_agreement)


def _report(
    folder: Path, made: Path, wanted: Wanted, precision: str, replaced: list[Replaced]
) -> dict[str, Any]:
    """Collect sizes, zeros and where it all comes from."""
    files = {file.name: file.stat().st_size for file in sorted(made.iterdir())}
    return {
        "kind": "onnx export",
        "source": str(folder),
        "target": wanted.target,
        "precision": precision,
        "sparse": wanted.sparse,
        "provenance": provenance(),
        "bytes": files,
        "bytes_total": sum(files.values()),
        "operator": f"{DOMAIN}::Linear" if wanted.sparse else None,
        "linears": [asdict(one) for one in replaced],
        "weights": count_zeros(made),
    }


def _judge(report: dict[str, Any], output: Path) -> None:
    found = report.get("validation")
    if found is None or found["passed"]:
        return
    allowed = found["tolerance"]
    raise GateError(
        f"{output}: the export differs from the original: the largest logit difference is "
        f"{found['max_logit_difference_over_std']:.3g} standard deviations "
        f"(allowed: {allowed['max_logit_difference_over_std']}), the same next token in "
        f"{found['top1_agreement']:.1%} of {found['tokens']} places "
        f"(needed: {allowed['top1_agreement']:.1%}). See {output / REPORT_FILE}."
    )
