"""What transformers makes of a model folder: the model, a weightless one, the tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gblm.errors import CheckpointError, InputError, MachineError, UsageError
from gblm.model import experts
from gblm.model.folder import ModelFolder
from gblm.model.reader import Reader

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)
# Of x86 and arm64, what multiplies a dtype faster than float32; PyTorch emulates it without.
INSTRUCTIONS = {
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def load(
    model: str | Path | ModelFolder,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a dense model for inference.

    Args:
        model: an HF folder with safetensors, or a hub id.
        dtype: of the weights in memory; None keeps the checkpoint's.
        device: where to put the model.

    Raises:
        InputError: the folder is not a dense causal language model that transformers knows.
    """
    target, folder = check_device(device), ModelFolder.open(model)
    folder.check_dense()
    with Reader(folder) as reader:
        # transformers joins shard names unchecked and lets truncated files through
        check_shapes(reader)
    config = model_config(folder)
    try:
        loaded: nn.Module = from_files(folder, config, dtype)
    except Exception as error:
        raise InputError(f"{folder} could not be loaded by transformers: {error}") from error
    return loaded.to(target)


def from_files(folder: ModelFolder, config: Any, dtype: torch.dtype | None) -> PreTrainedModel:
    """Let transformers load a model from files that have been checked; None keeps their dtype."""
    loaded: PreTrainedModel = auto_class(config).from_pretrained(
        folder.path,
        config=config,
        dtype=dtype or "auto",
        trust_remote_code=False,
        use_safetensors=True,
        local_files_only=True,
    )
    return loaded.eval()


def skeleton(folder: ModelFolder, num_tensors: int, buffers: bool = False) -> nn.Module:
    """Build the model of config.json without memory for its weights, its experts one by one.

    Args:
        folder: an HF folder, dense or packed.
        num_tensors: how many tensors its files hold; a config that claims more decoder layers than
            that is refused before they are built.
        buffers: compute the buffers, such as rotary frequencies. Weights are then allocated for a
            moment each, so sizes must have been held against the files before.

    Raises:
        CheckpointError: config.json describes no model that can be built.
    """
    from accelerate import init_empty_weights

    try:
        config = model_config(folder)
        claimed = config.get_text_config().num_hidden_layers
        if 0 < claimed <= num_tensors:
            with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
                model: nn.Module = auto_class(config).from_config(config, trust_remote_code=False)
            experts.unfuse(model)
            return model
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{folder}: config.json describes no model that can be built: {error}"
        ) from error
    raise CheckpointError(
        f"{folder}: config.json claims {claimed} decoder layers; the files hold {num_tensors} "
        "tensors in all."
    )


def model_config(folder: ModelFolder) -> Any:
    """Read config.json as transformers does, and choose the code that does all it says.

    PyTorch's own attention, transformers' default, silently leaves out Gemma 2's cap on logits, and
    transformers' grouped product of experts rounds otherwise than linears do.

    Raises:
        CheckpointError: transformers does not know the architecture.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    kind = folder.config.get("model_type")
    if kind not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{folder}: config.json names the model_type {str(kind)[:40]!r}, which transformers "
            f"{version('transformers')} does not know."
        )
    config = AutoConfig.from_pretrained(folder.path, trust_remote_code=False, local_files_only=True)
    if getattr(config.get_text_config(), "attn_logit_softcapping", None):
        config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def auto_class(config: Any) -> Any:
    """Choose transformers' class for a config: that of models with towers, or of plain text."""
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

    is_text = config.get_text_config() is config
    return AutoModelForCausalLM if is_text else AutoModelForMultimodalLM


def names_in_memory(model: nn.Module, stored: Iterable[str]) -> dict[str, str]:
    """Map the names of stored tensors to those in the model, where they differ.

    Files on the hub keep the names of the classes of their time, and transformers translates them.
    Text models without experts have had one set of names throughout.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    whole: Any = model
    if whole.config.get_text_config() is whole.config and not experts.blocks(model):
        return {}
    rules, own = get_model_conversion_mapping(whole), experts.name_in_memory(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    names = {name: own(rename_source_key(name, renamings, [])[0]) for name in stored}
    return {name: new for name, new in names.items() if new != name}


def check_shapes(reader: Reader) -> nn.Module:
    """Hold a reader's tensors against the model of config.json, and name them as that does.

    Returns:
        The model, without memory for its weights.

    Raises:
        CheckpointError: a tensor has another shape, or config.json describes no model.
    """
    model = named_skeleton(reader)
    for name, tensor in model.state_dict().items():
        if name in reader and (shape := reader.headers[name][0]) != tuple(tensor.shape):
            raise CheckpointError(
                f"{reader.folder}: {name} is stored as {list(shape)}, but config.json makes it "
                f"{list(tensor.shape)}."
            )
    return model


def rename_as_in_memory(reader: Reader) -> None:
    """Let a reader call tensors as the model in memory does, where towers or experts differ."""
    config = reader.folder.config
    if "text_config" in config or experts.are_named(config):
        named_skeleton(reader)


def named_skeleton(reader: Reader) -> nn.Module:
    """Build the model of a reader without memory, and let the reader name tensors as that does.

    Raises:
        CheckpointError: see `skeleton` and `Reader.split`; or there are experts that no layer has.
    """
    model = skeleton(reader.folder, len(reader.headers))
    reader.rename(names_in_memory(model, reader))
    reader.split(experts.cuts(model))
    experts.check_count(model, reader)
    return model


def load_tokenizer(model: str | Path | ModelFolder) -> Any:
    """Load the tokenizer of a model folder or hub id.

    Raises:
        InputError: there is none, or it is another model's.
    """
    from transformers import AutoTokenizer

    folder = ModelFolder.open(model)
    try:
        found = AutoTokenizer.from_pretrained(
            folder.path, trust_remote_code=False, local_files_only=True
        )
    except Exception as error:
        raise InputError(f"{folder}: the tokenizer could not be loaded: {error}") from error
    rows = folder.text_config.get("vocab_size", found.vocab_size)
    if found.vocab_size > rows:
        raise InputError(
            f"{folder}: the tokenizer knows {found.vocab_size} tokens, the model {rows}: it is "
            "another model's."
        )
    return found


def fast_dtype(stored: torch.dtype, device: str | torch.device = "cpu") -> torch.dtype:
    """Return the dtype to compute in where nobody chose one: the stored one, or float32.

    A CPU without instructions for a dtype takes some eight times as long for it as for float32, an
    Intel one whose only instructions for bfloat16 are AVX-512's twice as long.
    """
    needed, has = INSTRUCTIONS.get(stored, ()), torch.cpu.get_capabilities()
    slow = {"avx512_bf16"} if "Intel" in str(has.get("cpu_name")) else set()
    fast = any(has.get(name) for name in needed if name not in slow)
    if not needed or torch.device(device).type != "cpu" or fast:
        return stored
    _say_float32(stored)
    return torch.float32


@cache
def _say_float32(stored: torch.dtype) -> None:
    name = str(stored).removeprefix("torch.")
    logger.info("computing in float32, which this CPU multiplies faster than %s", name)


def auto_dtype(folder: ModelFolder, device: str | torch.device = "cpu") -> torch.dtype | None:
    """Return the `fast_dtype` of what config.json names; None, the checkpoint's, for others."""
    stored = next((dtype for dtype in INSTRUCTIONS if str(dtype) == folder.dtype), None)
    return None if stored is None else fast_dtype(stored, device)


def check_device(device: str | torch.device) -> torch.device:
    """Return the torch device of this name, if it is there.

    Raises:
        UsageError: not a device name.
        MachineError: this machine has no such device.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"device {device!r} is unknown: use cpu, cuda or cuda:N.") from error
    if found.type not in ("cpu", "cuda"):
        raise UsageError(f"device {device!r} is not supported: use cpu, cuda or cuda:N.")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise MachineError(
            f"device {device} was asked for, but torch sees {torch.cuda.device_count()} CUDA "
            "devices here, numbered from 0; there is no CUDA device of that number."
        )
    return found
