"""Folders laid out like the first sparse checkpoints that people try: one command packs each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Run
from legacy_cases import FIXTURES, PUBLISHED, UP, Tensors, published
from safetensors.torch import load_file

from gblm import packed
from gblm.checkpoint.inspect import inspect, verify
from gblm.errors import InputError
from gblm.export.dense import export_dense
from gblm.export.legacy import export_legacy
from gblm.model.folder import ModelFolder
from gblm.serve.access import Server
from gblm.serve.launch import check
from gblm.sparse.weights import same_bits

VALUES = dict.fromkeys(PUBLISHED, "bfloat16") | {"2of4-quantized.w4a16": "int4:row"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_one_command_packs_it(name: str, gblm: Run, tmp_path: Path) -> None:
    source, ours = published(name, tmp_path / "source"), tmp_path / "ours"
    done = gblm("export", "pack", source, "--output", ours)
    assert done.code == 0, done
    verify(ModelFolder.open(ours))
    groups = inspect(ModelFolder.open(ours))["groups"]
    assert [(g["linears"], g["pattern"], g["dtype"]) for g in groups] == [(7, "2:4", VALUES[name])]
    settings = "generation_config.json"
    assert (ours / settings).read_text() == (source / settings).read_text()
    model = packed.load(ours, "dense")
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert model(torch.arange(8).reshape(1, -1)).logits.isfinite().all()


def dense(source: Path, folder: Path) -> Tensors:
    """The weights that a folder becomes."""
    export_legacy(source, folder / "ours")
    export_dense(ModelFolder.open(folder / "ours"), folder / "dense")
    return load_file(folder / "dense/model.safetensors")


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(same_bits(a[name], b[name]) for name in a)


def test_shards_hold_what_one_file_held(tmp_path: Path) -> None:
    shards = dense(published("2of4", tmp_path / "source"), tmp_path / "shards")
    assert same(shards, dense(FIXTURES / "served/24-bitmask", tmp_path / "file"))


def test_codes_that_are_stored_dense_are_those_beneath_a_mask(tmp_path: Path) -> None:
    original, masked, plain = (
        dense(published(name, tmp_path / name / "source"), tmp_path / name)
        for name in PUBLISHED[:3]
    )
    assert same(masked, plain)
    weight = original[f"{UP}.weight"]
    assert (plain[f"{UP}.weight"] - weight).norm() < 0.05 * weight.norm()


def change(folder: Path, **fields: object) -> Path:
    """The folder with other fields in its quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_older_name_of_the_settings_is_read(tmp_path: Path) -> None:
    """compressed-tensors 0.6 said compression_config, and of floats no method."""
    source = published("2of4", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    fields = config.pop("quantization_config")
    del fields["quant_method"]
    (source / "config.json").write_text(json.dumps(config | {"compression_config": fields}))
    export_legacy(source, tmp_path / "ours")
    ours = json.loads((tmp_path / "ours/config.json").read_text())
    assert "compression_config" not in ours
    verify(ModelFolder.open(tmp_path / "ours"))


def test_what_is_not_sparse_is_refused_before_vllm_starts(tmp_path: Path) -> None:
    """int4 codes of a dense model, beside settings that vLLM no longer takes."""
    source = published("2of4-FP8-dynamic-0.8", tmp_path / "source")
    change(source, format="pack-quantized")
    assert ModelFolder.open(source).kind == "quantised"
    with pytest.raises(InputError, match=r"remove it from config\.json, and vLLM serves them"):
        check(Server(source))
    with pytest.raises(InputError, match="names no sparse format"):
        export_legacy(source, tmp_path / "out")
