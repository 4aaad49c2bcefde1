"""What stands beside the graph: configuration, tokenizer, the operator's library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from gblm.checkpoint.writer import copy_side_files, write_json
from gblm.export.onnx_model.runtime import CONFIG_FILE, MODEL_FILE, library
from gblm.folder import read_config, read_json_object

LIBRARY_FILE = "libgblm_ort.so"
TENSORRT_FILE = "tensorrt_options.json"
# transformers' own default, which older readers take when the old key is missing.
DEFAULT_THETA = 10000.0


def complete(source: Path, folder: Path, sparse: bool) -> None:
    """Add what the graph's maker leaves out.

    Args:
        source: the model folder.
        folder: with the graph and genai_config.json.
        sparse: whether the graph needs the operator's library.
    """
    copy_side_files(source, folder)
    config = {key: v for key, v in read_config(source).items() if key != "quantization_config"}
    write_json(folder / "config.json", with_rope_theta(config))
    if sparse:
        shutil.copyfile(library(), folder / LIBRARY_FILE)
        _name_library(folder)


def settle_head_size(folder: Path) -> None:
    """Give keys and values their last dimension as a number, which the model builder only names.

    lm-eval's `onnxruntime` backend takes a name for 1.
    """
    import onnx

    decoder = read_json_object(folder / CONFIG_FILE)["model"]["decoder"]
    model = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = decoder["head_size"]
    (folder / MODEL_FILE).write_bytes(model.SerializeToString())


def with_rope_theta(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary base in both spellings: transformers 5 writes `rope_parameters` alone.

    Readers of the old key silently take 10000 for a missing one.
    """
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict) and "rope_theta" in parameters:
        return config | {"rope_theta": parameters["rope_theta"]}
    theta = config.get("rope_theta", DEFAULT_THETA)
    return config | {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def write_tensorrt_options(folder: Path, precision: str) -> None:
    """Provider options that let TensorRT look for 2:4 weights; whether it gains is its choice."""
    options = {
        "trt_sparsity_enable": True,
        "trt_fp16_enable": precision == "fp16",
        "trt_bf16_enable": precision == "bf16",
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": "tensorrt_cache",
    }
    write_json(folder / TENSORRT_FILE, {"TensorrtExecutionProvider": options})


def _name_library(folder: Path) -> None:
    """onnxruntime-genai looks for it beside the graph, so that the folder may be moved."""
    path = folder / CONFIG_FILE
    config = read_json_object(path)
    options = config["model"]["decoder"]["session_options"]
    options["custom_ops_library"] = LIBRARY_FILE
    path.write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
