"""Decoder layers streamed from disk: the checkpoint's weights, one layer at a time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model
from safetensors.torch import load_file, save_file

from gblm.errors import CheckpointError
from gblm.model.folder import ModelFolder
from gblm.model.layers import stream
from gblm.model.loading import load


def test_open_layers_hold_the_checkpoints_weights_and_closed_ones_nothing(tiny: Path) -> None:
    want = load(tiny).state_dict()
    with stream(ModelFolder.open(tiny)) as layers:
        for index in range(len(layers)):
            with layers.open(index) as module:
                for name, tensor in module.state_dict().items():
                    assert torch.equal(tensor, want[f"{layers.name(index)}.{name}"])
            assert all(p.device.type == "meta" for p in module.parameters())


def test_changes_to_an_open_layer_do_not_reach_the_file(tiny: Path) -> None:
    before = (tiny / "model.safetensors").read_bytes()
    with stream(ModelFolder.open(tiny)) as layers:
        with layers.open(0) as module, torch.no_grad():
            module.self_attn.q_proj.weight.zero_()
        with layers.open(0) as module:
            assert module.self_attn.q_proj.weight.any()
    assert (tiny / "model.safetensors").read_bytes() == before


def test_the_frame_equals_the_models_and_ties_the_head(tiny: Path) -> None:
    model = load(tiny)
    with stream(ModelFolder.open(tiny)) as layers:
        layers.load_frame(head=True)
        assert layers.model.lm_head.weight is layers.model.model.embed_tokens.weight
        assert torch.equal(layers.model.model.norm.weight, model.model.norm.weight)
        rotary, want = layers.model.model.rotary_emb, model.model.rotary_emb
        assert torch.equal(rotary.inv_freq, want.inv_freq)


def test_a_head_that_is_stored_is_not_tied_whatever_the_config_says(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in tensors
    own = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": own}, folder / "model.safetensors", {"format": "pt"})
    with stream(ModelFolder.open(folder)) as layers:
        layers.load_frame(head=True)
        assert torch.equal(layers.model.lm_head.weight, load(folder).lm_head.weight)
        assert torch.equal(layers.model.lm_head.weight, own)


def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    lacking = {n: t for n, t in tensors.items() if "layers.1.mlp.up_proj" not in n}
    save_file(lacking, folder / "model.safetensors", {"format": "pt"})
    missing = pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight is missing")
    with missing, stream(ModelFolder.open(folder)):
        pass
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    misshapen = pytest.raises(CheckpointError, match=r"is stored as \[2, 2\], but config\.json")
    with misshapen, stream(ModelFolder.open(folder)):
        pass


def test_memory_of_the_file_is_let_go(tmp_path: Path) -> None:
    """Pages of a mapped file count as this process's memory until the file is closed."""
    import psutil

    folder = save_tiny_model(tmp_path / "m", num_hidden_layers=8, hidden_size=512, head_dim=128)
    layer = (folder / "model.safetensors").stat().st_size / 8
    with stream(ModelFolder.open(folder)) as layers:
        with layers.open(0):
            start = psutil.Process().memory_info().rss
        for index in range(len(layers)):
            with layers.open(index):
                pass
        assert psutil.Process().memory_info().rss - start < 3 * layer


def test_absurd_sizes_are_refused_before_allocation(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 2**40}))
    absurd = pytest.raises(CheckpointError, match=r"but config\.json makes it")
    with absurd, stream(ModelFolder.open(folder)):
        pass
