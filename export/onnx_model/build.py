"""How a graph is made: by onnxruntime-genai's model builder, or of standard operators by torch.

The builder prints, changes the working environment and leaks memory, so it runs in a process of its
own. Its graphs have fused operators of ONNX Runtime; those of `torch.onnx.export` have operators of
ai.onnx alone and the names that optimum uses, run everywhere, and are about 15 % slower.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gblm.errors import InputError
from gblm.export.onnx_model.runtime import CONFIG_FILE, MODEL_FILE
from gblm.export.onnx_model.storage import DATA_FILE
from gblm.files import write_json

BUILDER = "onnxruntime_genai.models.builder"
OPSET = 20
# Example sizes must differ from each other and from 1, or they become constants of the graph.
BATCH, NEW, PAST = 2, 3, 5


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


class Wrapper(nn.Module):
    """A causal language model whose cache is a flat list of tensors."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Give logits [batch, new, vocabulary], then keys and values [batch, heads, all, dim]."""
        from transformers.cache_utils import DynamicCache

        cache = DynamicCache(config=self.model.config)
        for index in range(len(past_key_values) // 2):
            cache.update(past_key_values[2 * index], past_key_values[2 * index + 1], index)
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        pairs = [
            tensor for layer in out.past_key_values.layers for tensor in (layer.keys, layer.values)
        ]
        return (out.logits, *pairs)


def build_portable(model: nn.Module, output: Path) -> None:
    """Make a float32 graph of standard operators.

    Inputs: input_ids, attention_mask, position_ids, past_key_values.N.key|value; outputs: logits,
    present.N.key|value.

    Args:
        model: a dense transformers model in float32.
        output: a folder; the graph, its data and genai_config.json are written there.
    """
    config: Any = model.config
    text = config.get_text_config()
    layers = int(text.num_hidden_layers)
    names = [f"{index}.{part}" for index in range(layers) for part in ("key", "value")]
    generator = torch.Generator().manual_seed(0)
    heads, dim = int(text.num_key_value_heads), int(text.head_dim)
    cache = [torch.randn(BATCH, heads, PAST, dim, generator=generator) for _ in names]
    arguments = (
        torch.randint(0, int(text.vocab_size), (BATCH, NEW), generator=generator),
        torch.ones(BATCH, PAST + NEW, dtype=torch.long),
        torch.arange(PAST, PAST + NEW)[None].repeat(BATCH, 1),
        cache,
    )
    program = _quietly_export(model, arguments, names)
    program.save(str(output / MODEL_FILE), external_data=True)
    (output / DATA_FILE).touch()
    _write_genai_config(output, config, dim)


def _quietly_export(model: nn.Module, arguments: tuple[Any, ...], names: list[str]) -> Any:
    past = [{0: "batch_size", 2: "past_sequence_length"} for _ in names]
    shapes = (
        {0: "batch_size", 1: "sequence_length"},
        {0: "batch_size", 1: "total_sequence_length"},
        {0: "batch_size", 1: "sequence_length"},
        past,
    )
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with (
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            Wrapper(model).eval(),
            arguments,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=[
                "input_ids", "attention_mask", "position_ids",
                *(f"past_key_values.{name}" for name in names),
            ],
            output_names=["logits", *(f"present.{name}" for name in names)],
            opset_version=OPSET,
        )  # fmt: skip


def _write_genai_config(output: Path, config: Any, dim: int) -> None:
    """Write what onnxruntime-genai and lm-eval's `onnxruntime` backend need to run the graph."""
    text = config.get_text_config()
    end = text.eos_token_id
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": dim,
        "hidden_size": text.hidden_size,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": text.num_key_value_heads,
    }
    length = int(text.max_position_embeddings)
    first = end[0] if isinstance(end, list) else end
    model = {
        "bos_token_id": text.bos_token_id,
        "eos_token_id": end,
        "pad_token_id": text.pad_token_id if text.pad_token_id is not None else first,
        "context_length": length,
        "decoder": decoder,
        "type": text.model_type,
        "vocab_size": text.vocab_size,
    }
    # Keys and values grow by concatenation here, so they cannot share one buffer.
    search = {"do_sample": False, "max_length": length, "past_present_share_buffer": False}
    write_json(output / CONFIG_FILE, {"model": model, "search": search})
