"""Make a folder for ONNX Runtime: a graph, its weights, what else is needed, and proof."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gblm import packed
from gblm.cache import remember
from gblm.checkpoint.write import check_output, copy_side_files, new_folder
from gblm.errors import GateError, InputError, MachineError, UsageError
from gblm.export.dense import export_dense
from gblm.export.onnx.config import graph_config
from gblm.export.onnx.rewrite import Replaced, pack_graph
from gblm.export.onnx.runtime import (
    BUILDER,
    CONFIG_FILE,
    DOMAIN,
    LIBRARY_FILE,
    MODEL_FILE,
    REPORT_FILE,
    check_installation,
    library,
)
from gblm.export.onnx.validate import PROMPT, validate
from gblm.files import read_json, write_json
from gblm.model import loading
from gblm.model.folder import ModelFolder, model_name
from gblm.model.packed_reader import PackedReader
from gblm.model.reader import Reader
from gblm.progress import Progress, no_progress
from gblm.provenance import provenance

# Of weights and activations, by where the graph is to run; the default first.
PRECISIONS = {"cpu": ("fp32", "int8", "int4"), "cuda": ("fp16", "bf16", "fp32", "int8", "int4")}


@dataclass(frozen=True)
class Wanted:
    """Says what to export; the fields are the options of `gblm export onnx`.

    `command`, a call of gblm without private paths, goes into the report.
    """

    target: str = "cpu"
    precision: str | None = None
    sparse: bool = False
    validate: int = 64
    command: str | None = None


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
    config, tokenizer = graph_config(folder), loading.load_tokenizer(folder)
    if wanted.sparse:
        _check_sparse(folder)
    if wanted.validate and wanted.target == "cuda" and not torch.cuda.is_available():
        raise MachineError(
            "--target cuda: there is no CUDA device here to validate the export on; --validate 0 "
            "writes it unproven."
        )
    if folder.kind == "dense":
        with Reader(folder) as reader:
            loading.check_shapes(reader)
    check_output(output, overwrite, _needed_bytes(folder), folder.path)
    step = progress("exporting", 2 + bool(wanted.validate))
    with new_folder(output, overwrite) as made:
        replaced = _make(folder, config, made, wanted, precision)
        step()
        _complete(folder, config, made, wanted.sparse)
        report = _report(model_name(source), made, wanted, precision, replaced)
        step()
        if wanted.validate:
            prompt = tokenizer(PROMPT, return_tensors="pt")["input_ids"][0]
            model = _original(folder)
            report["validation"] = validate(model, prompt, made, wanted.validate, replaced)
            step()
        write_json(made / REPORT_FILE, report)
        remember(made, {"source": str(folder.path.resolve())})
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


def _make(
    folder: ModelFolder, config: dict[str, Any], made: Path, wanted: Wanted, precision: str
) -> list[Replaced]:
    """Write the graph and its data; tell what was replaced in it."""
    with tempfile.TemporaryDirectory(dir=made.parent, prefix=".onnx-") as name:
        work, dense = Path(name), folder.path
        if folder.kind == "packed":
            dense = work / "dense"
            export_dense(folder, dense, dtype=torch.float32)
            config = config | {"dtype": "float32"}
        build(_staged(dense, config, work / "staged"), made, precision, wanted.target)
    return pack_graph(made, folder) if wanted.sparse else []


def _staged(source: Path, config: dict[str, Any], folder: Path) -> Path:
    """Make a folder of links to a model's files, beside another config.json."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    (folder / "config.json").unlink()
    write_json(folder / "config.json", config)
    return folder


def build(source: Path, output: Path, precision: str, target: str) -> None:
    """Make a graph from a dense HF folder with onnxruntime-genai's model builder.

    The builder prints, changes the working environment and leaks memory, so it runs in a process of
    its own. It fetches nothing.

    Raises:
        InputError: the builder does not know the model.
    """
    with tempfile.TemporaryDirectory(dir=output.parent) as cache:
        command = [
            *(sys.executable, "-m", BUILDER, "-i", str(source), "-o", str(output)),
            *("-p", precision, "-e", target, "-c", cache),
            # A cache as long as the text in layers with a sliding window, too: shorter ones cannot
            # be rewound, and only onnxruntime-genai knows how to feed them.
            *("--extra_options", "windowed_kv_cache=false"),
        ]
        quiet = {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        done = subprocess.run(
            command, env=os.environ | quiet, capture_output=True, text=True, check=False
        )
    if done.returncode or not (output / MODEL_FILE).is_file():
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise InputError(
            "the model builder of onnxruntime-genai cannot make a graph of this model: "
            f"{said[-1] if said else f'exit status {done.returncode}'}"
        )


def _original(folder: ModelFolder) -> Any:
    """Load what an export is held against: the torch model in float32, weights as stored."""
    if folder.kind == "packed":
        return packed.load(folder, backend="dense", dtype=torch.float32)
    return loading.load(folder, dtype=torch.float32)


def _complete(source: ModelFolder, config: dict[str, Any], folder: Path, sparse: bool) -> None:
    """Add what the graph's maker leaves out: tokenizer, config.json, the operator's library."""
    copy_side_files(source.path, folder)
    write_json(folder / "config.json", config)
    about = read_json(folder / CONFIG_FILE)
    decoder = about["model"]["decoder"]
    _correct_graph(folder / MODEL_FILE, config, decoder["head_size"])
    if sparse:
        shutil.copyfile(library(), folder / LIBRARY_FILE)
        # onnxruntime-genai looks for it beside the graph, so that the folder may be moved.
        decoder["session_options"]["custom_ops_library"] = LIBRARY_FILE
        write_json(folder / CONFIG_FILE, about)


def _correct_graph(path: Path, config: dict[str, Any], head_size: int) -> None:
    """Make exact what the model builder leaves vague.

    It only names the last dimension of keys and values; lm-eval's `onnxruntime` backend takes a
    name for 1. It writes Gemma's factor of embeddings, the root of their size, to two decimals.
    """
    import onnx_ir as ir

    model = ir.load(path)
    for value in (*model.graph.inputs, *model.graph.outputs):
        if str(value.name).startswith(("past_key_values.", "present.")) and value.shape is not None:
            value.shape = ir.Shape([*value.shape[:3], head_size])
    if config["model_type"].startswith("gemma"):
        scaled = next(node for node in model.graph if node.name == "/model/embed_tokens/Mul")
        factor = scaled.inputs[1]
        constant = factor.producer() if factor is not None else None
        if constant is None:
            raise InputError(
                "the model builder of onnxruntime-genai scales embeddings in a new way."
            )
        old = constant.attributes["value"].as_tensor()
        exact = np.asarray(config["hidden_size"] ** 0.5, old.dtype.numpy())
        constant.attributes.add(ir.AttrTensor("value", ir.tensor(exact, name=old.name)))
    ir.save(model, path)


def _report(
    source: str, made: Path, wanted: Wanted, precision: str, replaced: list[Replaced]
) -> dict[str, Any]:
    """Collect sizes and where it all comes from; of a local folder the name alone."""
    files = {
        str(file.relative_to(made)): file.stat().st_size
        for file in sorted(made.rglob("*"))
        if file.is_file()
    }
    return {
        "kind": "onnx export",
        "command": wanted.command,
        "source": source,
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
    if wrong := found["wrong_weights"]:
        what = f"the graph's weight of {wrong[0]} ({len(wrong)} in all) is not the checkpoint's"
    else:
        what = (
            f"its logits are {found['logit_deviation']:.3g} off (root mean square, worst place), "
            f"where its arithmetic explains {found['allowed_logit_deviation']:.3g}"
        )
    raise GateError(
        f"{output}: the export differs from the original: {what}. See {output / REPORT_FILE}."
    )
