"""Graphs by onnxruntime-genai's model builder, in a process of its own.

The builder prints, changes the working environment and leaks memory; nothing of that is ours then.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from gblm.errors import InputError
from gblm.export.onnx_model.runtime import MODEL_FILE

BUILDER = "onnxruntime_genai.models.builder"


def build(source: Path, output: Path, precision: str, provider: str) -> None:
    """Make a graph from a dense HF folder.

    Args:
        source: the folder; nothing is fetched from elsewhere.
        output: a folder for the graph, genai_config.json and the tokenizer.
        precision: fp32, fp16, bf16, int8 or int4, as the builder names them.
        provider: cpu or cuda.

    Raises:
        InputError: the builder does not know the model.
    """
    with tempfile.TemporaryDirectory(dir=output.parent) as cache:
        command = [
            *(sys.executable, "-m", BUILDER, "-i", str(source), "-o", str(output)),
            *("-p", precision, "-e", provider, "-c", cache),
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
