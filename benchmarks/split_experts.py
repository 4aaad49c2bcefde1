"""A small mixture of experts that was a trained model: SmolLM2 with its MLPs split into experts.

No small trained mixture is at hand. Neurons that are active on the same tokens go together, and a
router is fitted by least squares to the norms of what the experts give. Its scores lie so close
that all chosen experts count alike, as they did in the MLP: with all chosen it would be SmolLM2.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import normalize
from transformers import MixtralConfig

from gblm.calibrate.text import draw
from gblm.checkpoint.write import copy_side_files
from gblm.files import write_json
from gblm.model.loading import load, load_tokenizer
from gblm.recipe import Calibration

EXPERTS, CHOSEN, ROUNDS, RIDGE = 8, 6, 10, 0.01
FLAT = 2.0**-10
SAME = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
    "num_key_value_heads", "head_dim", "rope_parameters", "max_position_embeddings",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "hidden_act",
)  # fmt: skip


@torch.no_grad()
def split(source: Path, target: Path, chosen: int = CHOSEN) -> Path:
    """Write a LLaMA model as a mixture of EXPERTS, of which a token takes `chosen`."""
    model: Any = load(source, torch.float32)
    seen: dict[int, Tensor] = {}
    for number, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(
            lambda module, args, number=number: seen.__setitem__(number, args[0].flatten(0, 1))
        )
    model(draw(Calibration(num_samples=16, seq_len=256), source, load_tokenizer(source)))
    tensors = {
        n: t for n, t in model.state_dict().items() if ".mlp." not in n and "lm_head" not in n
    }
    for number, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{number}.block_sparse_moe"
        tensors |= {f"{prefix}.{n}": t for n, t in experts(layer.mlp, seen.pop(number), chosen)}
    target.mkdir(parents=True)
    copy_side_files(source, target)
    kept = {n: t.to(torch.bfloat16).contiguous() for n, t in tensors.items()}
    save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    of = model.config.to_dict()
    config = MixtralConfig(
        **{name: of[name] for name in SAME}, intermediate_size=of["intermediate_size"] // EXPERTS,
        num_local_experts=EXPERTS, num_experts_per_tok=chosen, sliding_window=None,
    )  # fmt: skip
    named = {"architectures": ["MixtralForCausalLM"], "dtype": "bfloat16"}
    write_json(target / "config.json", config.to_dict() | named)
    return target


def experts(mlp: Any, inputs: Tensor, chosen: int) -> Iterator[tuple[str, Tensor]]:
    """Give the tensors of a Mixtral block; its routers' weights of a token add up to 1."""
    hidden = mlp.act_fn(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
    down, norms = mlp.down_proj.weight, []
    for number, own in enumerate(clusters(hidden.abs() * down.norm(dim=0))):
        norms.append((hidden[:, own] @ down[:, own].t()).norm(dim=1))
        yield f"experts.{number}.w1.weight", mlp.gate_proj.weight[own]
        yield f"experts.{number}.w3.weight", mlp.up_proj.weight[own]
        yield f"experts.{number}.w2.weight", down[:, own] * chosen
    wanted = torch.stack(norms, 1)
    wanted -= wanted.mean(1, keepdim=True)
    gram = inputs.t() @ inputs
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    router = torch.linalg.solve(gram, inputs.t() @ wanted).t()
    yield "gate.weight", router * FLAT / (inputs @ router.t()).std()


def clusters(size: Tensor) -> list[Tensor]:
    """Sort neurons [tokens, neurons] into equal groups that are active together (k-means)."""
    points = normalize((size - size.mean(0)).t(), dim=1)
    seed = torch.Generator().manual_seed(0)
    centres = points[torch.randperm(len(points), generator=seed)[:EXPERTS]]
    for _ in range(ROUNDS):
        owner, room = [-1] * len(points), [len(points) // EXPERTS] * EXPERTS
        for place in (points @ centres.t()).flatten().argsort(descending=True).tolist():
            neuron, group = divmod(place, EXPERTS)
            if owner[neuron] < 0 and room[group]:
                owner[neuron], room[group] = group, room[group] - 1
        groups = [(torch.tensor(owner) == group).nonzero()[:, 0] for group in range(EXPERTS)]
        centres = normalize(torch.stack([points[own].mean(0) for own in groups]), dim=1)
    return groups
