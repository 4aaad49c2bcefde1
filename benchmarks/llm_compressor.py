"""Quantise a model with llm-compressor's GPTQ, in an environment that has no gblm.

    python llm_compressor.py MODEL TOKENS.json W8A8|W4A16 TARGET

TOKENS.json holds windows of token ids, on which GPTQ is calibrated.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

GROUP = 64  # divides the columns of SmolLM2


def main(model: str, tokens: str, scheme: str, target: str) -> None:
    """Write TARGET, which vLLM serves with its own integer kernels."""
    from compressed_tensors.quantization import preset_name_to_scheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM

    windows = json.loads(Path(tokens).read_text())
    masks = [[1] * len(window) for window in windows]
    how = preset_name_to_scheme(scheme, ["Linear"])
    if how.weights.group_size:
        how.weights.group_size = GROUP
    oneshot(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"), tokenizer=model,
        dataset=Dataset.from_dict({"input_ids": windows, "attention_mask": masks}),
        num_calibration_samples=len(windows), max_seq_length=len(windows[0]),
        recipe=GPTQModifier(config_groups={"group_0": how}, ignore=["lm_head"]),
        output_dir=target,
    )  # fmt: skip
    halve(Path(target))


def halve(folder: Path) -> None:
    """Store floats as bfloat16, in which vLLM computes; GPTQ is exact in float32 alone."""
    import torch
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    tensors = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
