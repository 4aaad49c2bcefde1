"""Write config.json as onnxruntime-genai's builder, and readers before transformers 5, want it.

transformers 5 writes rotary embeddings as `rope_parameters` alone and leaves out what the code of a
family implies. The builder takes a default for an older key that is missing, and full attention for
every layer where `layer_types` is.
"""

from __future__ import annotations

from typing import Any

from gblm.errors import CheckpointError, InputError
from gblm.model import experts
from gblm.model.folder import ModelFolder
from gblm.model.loading import model_config

# What the builder computes as transformers does.
ROPE_TYPES = ("default", "linear", "llama3", "longrope", "yarn")
# Families whose layers all slide when there is a window, although config.json names none.
ALL_SLIDE = ("mistral", "phi3")
WAY_OUT = "`gblm serve` and `gblm export dense` take it"


def graph_config(folder: ModelFolder) -> dict[str, Any]:
    """Write a config.json that transformers reads as before, and the builder rightly.

    Raises:
        InputError: the builder makes no graph, or a wrong one, of such a model.
    """
    try:
        found = model_config(folder)
    except CheckpointError:
        raise
    except Exception as error:
        raise InputError(f"{folder}: transformers cannot read config.json: {error}") from error
    config: dict[str, Any] = found.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        config.pop(key, None)
    _check_architecture(folder, config.get("architectures") or [""])
    if experts.are_named(config):
        raise InputError(f"{folder}: a mixture of experts is not exported to ONNX; {WAY_OUT}.")
    config |= _rotary(folder, config)
    if config["model_type"] in ALL_SLIDE and config.get("sliding_window"):
        config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
    return config


def _check_architecture(folder: ModelFolder, names: list[str]) -> None:
    """Refuse what is no text model, of which the builder would make several graphs or a part."""
    if not names[0].endswith("ForCausalLM"):
        raise InputError(
            f"{folder}: the model builder of onnxruntime-genai knows no text model "
            f"{names[0] or 'without architecture'}; {WAY_OUT}."
        )


def _rotary(folder: ModelFolder, config: dict[str, Any]) -> dict[str, Any]:
    """Give the keys of rotary embeddings in all spellings."""
    rope = dict(config.get("rope_parameters") or {})
    if local := rope.get("sliding_attention"):
        # Gemma 3: one base for each kind of layer. The builder wants the local one by another name.
        rope |= rope["full_attention"] | {"rope_local_base_freq": local["rope_theta"]}
    kind = rope["type"] = rope["rope_type"]
    refused = None
    if kind not in ROPE_TYPES:
        refused = f"scale positions of the rope_type {kind!r}"
    elif local and kind != "default":
        refused = f"scale positions (rope_type {kind!r}) in layers of full attention alone"
    elif not all(config.get("no_rope_layers") or [True]):
        refused = "leave rotary embeddings out of some layers"
    if refused:
        raise InputError(
            f"{folder}: the model builder of onnxruntime-genai cannot {refused}; {WAY_OUT}."
        )
    made = {"rope_parameters": rope, "rope_theta": rope["rope_theta"]}
    if config["model_type"] == "phi3" and kind == "default":
        # Another length means scaled positions to the builder.
        made["original_max_position_embeddings"] = config["max_position_embeddings"]
    return made
