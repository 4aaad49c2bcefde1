"""`gblm export onnx`: a graph, its weights, what stands beside them, and proof that it is right."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
from gblm.export.onnx.rewrite import Replaced, pack_graph
from gblm.export.onnx.runtime import (
    CONFIG_FILE,
    DOMAIN,
    LIBRARY_FILE,
    MODEL_FILE,
    REPORT_FILE,
    check_installation,
    library,
)
from gblm.export.onnx.storage import DATA_FILE
from gblm.export.onnx.validate import TOLERANCES, Tolerance, validate
from gblm.files import read_json, write_json
from gblm.model import loading
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
from gblm.model.reader import Reader
from gblm.progress import Progress, no_progress
from gblm.provenance import provenance

BUILDER = "onnxruntime_genai.models.builder"
# transformers' own default, which older readers take when the old key is missing.
DEFAULT_THETA = 10000.0


# Of weights and activations, by where the graph is to run; the default first.
PRECISIONS = {"cpu": ("fp32", "int8", "int4"), "cuda": ("fp16", "bf16", "fp32", "int8", "int4")}


@dataclass(frozen=True)
class Wanted:
    """Says what to export; the fields are the options of `gblm export onnx`."""

    target: str = "cpu"
    precision: str | None = None
    sparse: bool = False
    validate: int = 64


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
    check_installation()
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
            tolerance = _tolerance(wanted, precision, replaced)
            report["validation"] = validate(model, folder.path, made, wanted.validate, tolerance)
            step()
        write_json(made / REPORT_FILE, report)
    _judge(report, output)
    return report


def check_target(target: str, precision: str | None, sparse: bool) -> str:
    """Choose the precision to export in.

    Args:
        target: a name of PRECISIONS.
        precision: a name, or None for the target's default.
        sparse: whether weights are to stay packed.

    Raises:
        UsageError: ONNX Runtime cannot run the combination; the reason stands in the message.
    """
    if target not in PRECISIONS:
        raise UsageError(f"--target {target!r} is unknown: choose from {', '.join(PRECISIONS)}.")
    known = PRECISIONS[target]
    chosen = precision or known[0]
    if chosen not in known:
        # Measured with ONNX Runtime 1.31 and 1.32, model builder 0.18.
        raise UsageError(
            f"--target {target} --precision {chosen}: ONNX Runtime cannot run it: its CPU provider "
            "fails on the shapes of the model builder's float16 graph, and has no MatMul for "
            f"bfloat16. Choose from {', '.join(known)}."
        )
    if sparse and target == "cuda":
        raise UsageError(
            "--sparse --target cuda: the operator has no CUDA kernel yet, and would copy every "
            "activation to the CPU and back. Export with --target cpu, or without --sparse."
        )
    if sparse and chosen != "fp32":
        raise UsageError(
            f"--sparse --precision {chosen}: packed weights keep the checkpoint's own values; "
            "--precision is that of the activations, fp32. For integer values prune with "
            f"--values {chosen if chosen.startswith('int') else 'int8'}."
        )
    return chosen


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
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=".onnx-") as name:
        work, dense = Path(name), folder.path
        if folder.kind == "packed":
            dense = work / "dense"
            export_dense(folder, dense, dtype=torch.float32)
        if not wanted.sparse:
            build(dense, made, precision, wanted.target)
            return []
        built = work / "built"
        build(dense, built, precision, wanted.target)
        replaced = pack_graph(built, folder, made)
        for file in built.iterdir():
            if file.name not in (MODEL_FILE, DATA_FILE):
                (made / file.name).write_bytes(file.read_bytes())
        return replaced


def build(source: Path, output: Path, precision: str, target: str) -> None:
    """Make a graph from a dense HF folder with onnxruntime-genai's model builder.

    The builder prints, changes the working environment and leaks memory, so it runs in a process of
    its own. It fetches nothing.

    Args:
        source: the folder.
        output: a folder for the graph, genai_config.json and the tokenizer.
        precision: as the builder names it.
        target: cpu or cuda.

    Raises:
        InputError: the builder does not know the model.
    """
    with tempfile.TemporaryDirectory(dir=output.parent) as cache:
        command = [
            *(sys.executable, "-m", BUILDER, "-i", str(source), "-o", str(output)),
            *("-p", precision, "-e", target, "-c", cache),
        ]
        quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            command, env=os.environ | quiet, capture_output=True, text=True, check=False
        )
    if done.returncode or not (output / MODEL_FILE).is_file():
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise InputError(
            f"{source}: the model builder of onnxruntime-genai cannot make a graph of it: "
            f"{said[-1] if said else f'exit status {done.returncode}'}"
        )


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
    return TOLERANCES[name]


def _report(
    folder: Path, made: Path, wanted: Wanted, precision: str, replaced: list[Replaced]
) -> dict[str, Any]:
    """Collect sizes and where it all comes from."""
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
