"""A dense causal language model: load it, name its prunable linears.

Nothing here is per model: decoder layers are found by type and count, linears by `nn.Linear`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gblm.checkpoint.head import Head
from gblm.checkpoint.reader import Reader
from gblm.choices import matches
from gblm.errors import CheckpointError, InputError, MachineError, UsageError
from gblm.folder import legacy_sentence, quant_method, read_config


def load(
    folder: Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"
) -> nn.Module:
    """Load a dense model for inference.

    Args:
        folder: a local HF folder with safetensors.
        dtype: of the weights in memory; None keeps the checkpoint's.
        device: where to put the model.

    Raises:
        InputError: the folder is not a dense causal language model that transformers knows.
    """
    from transformers import AutoModelForCausalLM

    target = check_device(device)
    refuse_packed(folder)
    with Reader(folder):
        pass  # transformers joins shard names unchecked and lets truncated files through
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
        )
    except Exception as error:
        raise InputError(f"{folder} could not be loaded by transformers: {error}") from error
    return model.to(target).eval()


def skeleton(folder: Path, num_tensors: int, buffers: bool = False) -> nn.Module:
    """The model of config.json without memory for its weights.

    Args:
        folder: a local HF folder, dense or packed.
        num_tensors: how many tensors its files hold; a config that claims more decoder layers than
            that is refused before they are built.
        buffers: compute the buffers, such as rotary frequencies. Weights are then allocated for a
            moment each, so sizes must have been held against the files before.

    Raises:
        CheckpointError: config.json describes no model that can be built.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        claimed = config.get_text_config().num_hidden_layers
        if 0 < claimed <= num_tensors:
            with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
                model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            return model
    except Exception as error:
        raise CheckpointError(
            f"{folder}: config.json describes no model that can be built: {error}"
        ) from error
    raise CheckpointError(
        f"{folder}: config.json claims {claimed} decoder layers; the files hold {num_tensors} "
        "tensors in all."
    )


def refuse_packed(folder: Path) -> None:
    """Raise InputError when a folder's weights are stored quantised or packed."""
    config = read_config(folder)
    if sentence := legacy_sentence(folder, config):
        raise InputError(sentence)
    if method := quant_method(config):
        way_out = "it is packed already" if method == "gblm" else "start from the dense model"
        raise InputError(f"{folder}: the weights are stored as `{method}`; {way_out}.")


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder}: the tokenizer could not be loaded: {error}") from error


def check_device(device: str | torch.device) -> torch.device:
    """A torch device that is there.

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


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The decoder layers and their name, such as "model.layers".

    Raises:
        InputError: no list of `num_hidden_layers` modules that hold an nn.Linear.
    """
    config: Any = model.config
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == count
            and any(isinstance(part, nn.Linear) for part in module.modules())
        ):
            return name, module
    raise InputError(
        f"{type(model).__name__} has no decoder layers with nn.Linear weights: "
        "gblm prunes LLaMA-like causal language models."
    )


def output_head(model: nn.Module, values: str, reader: Reader) -> Head | None:
    """The output head as it is to be packed; None if it stays floating.

    Args:
        model: of the checkpoint; needs no weights.
        values: "float", "int8" or "int4".
        reader: of the checkpoint.

    Raises:
        InputError: the head is no nn.Linear.
        GblmError: see `Head.of`.
    """
    if values == "float":
        return None
    own: Any = model
    module = own.get_output_embeddings()
    name = next((name for name, part in model.named_modules() if part is module), "")
    if not isinstance(module, nn.Linear) or not name:
        raise InputError(
            f"{type(model).__name__} has no output head that is an nn.Linear: --head float."
        )
    weight = f"{name}.weight"
    # As in transformers: a head that is stored counts, whatever config.json says of tying.
    source = weight if weight in reader else own.all_tied_weights_keys.get(weight, weight)
    return Head.of(reader, name, source, values)


def hidden_size(model: nn.Module) -> int:
    """Width of the hidden states."""
    config: Any = model.config
    return int(config.get_text_config().hidden_size)


def head_dim(model: nn.Module) -> int | None:
    """Rows of a query projection per attention head; None when config.json does not tell."""
    config: Any = model.config
    text = config.get_text_config()
    if found := getattr(text, "head_dim", None):
        return int(found)
    heads = getattr(text, "num_attention_heads", None)
    return int(text.hidden_size) // int(heads) if heads else None


def linears(layer: nn.Module) -> dict[str, nn.Linear]:
    """Every nn.Linear of a decoder layer by its local name, such as "self_attn.q_proj"."""
    return {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}


def prunable(
    model: nn.Module, targets: tuple[str, ...] = (), ignore: tuple[str, ...] = ()
) -> dict[str, nn.Linear]:
    """The linears to prune by full name.

    Args:
        model: a causal language model.
        targets: glob patterns that choose names; all if empty.
        ignore: glob patterns that leave names out; wins over `targets`.

    Raises:
        UsageError: a pattern matches no linear, or none is left.
    """
    names = dict(_named_linears(model))
    for flag, globs in (("--targets", targets), ("--ignore", ignore)):
        for glob in globs:
            if not any(matches(name, (glob,)) for name in names):
                raise UsageError(
                    f"{flag} {glob!r} matches no linear; the first one is {next(iter(names))}."
                )
    chosen = {
        name: linear
        for name, linear in names.items()
        if (not targets or matches(name, targets)) and not matches(name, ignore)
    }
    if not chosen:
        raise UsageError("--targets and --ignore leave no linear to prune.")
    return chosen


def _named_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    prefix, layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        found = linears(layer)
        _refuse_other_matrices(f"{prefix}.{index}", layer, found)
        for name, linear in found.items():
            yield f"{prefix}.{index}.{name}", linear


def _refuse_other_matrices(prefix: str, layer: nn.Module, found: dict[str, nn.Linear]) -> None:
    """Mixture-of-experts weights that are no nn.Linear would stay dense without a word."""
    known = {f"{name}.weight" for name in found}
    for name, parameter in layer.named_parameters():
        if parameter.ndim > 1 and name not in known:
            raise InputError(
                f"{prefix}.{name} {list(parameter.shape)} is no weight of an nn.Linear (fused "
                "mixture-of-experts weights are not): gblm does not prune this architecture."
            )
