"""Models that others made: what is claimed, how their weights arrive, and what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from legacy_cases import FIXTURES, TRUTH, UP, Tensors, altered, drop, put, same_bits
from safetensors.torch import load_file, save_file

from gblm.errors import GblmError, InputError, UsageError
from gblm.export.dense import export_dense
from gblm.export.legacy import export_legacy
from gblm.formats import from_spec
from gblm.serve.foreign import Foreign, is_legacy, settle
from gblm.serve.launch import Server, check, command
from gblm.values import FLOAT, ValueType, quantize
from gblm.weights import SparseWeight

Pack = Callable[..., Path]
PACKED = ("bitmask", "bitmask-0.8", "24-bitmask", "24-int8-channel", "24-int8-group",
          "marlin-int4", "marlin-int8", "marlin-int4-own", "marlin-int8-own")  # fmt: skip
ORDINARY: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head"],
}


def quantization(fixture: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FIXTURES / fixture / "config.json").read_text())
    return config["quantization_config"]


def arrived(folder: Path) -> Tensors:
    """What vLLM would load, with the parts of a weight far from each other in the stream."""
    foreign = pickle.loads(pickle.dumps(Foreign.open(str(folder))))
    stored = load_file(folder / "model.safetensors")
    order = sorted(stored, key=lambda name: name[::-1])
    return dict(foreign.parts((name, stored[name]) for name in order))


@pytest.mark.parametrize("fixture", PACKED)
def test_weights_arrive_as_the_converted_folder_holds_them(fixture: str, tmp_path: Path) -> None:
    export_legacy(FIXTURES / fixture, tmp_path / "ours")
    assert same_bits(arrived(FIXTURES / fixture), load_file(tmp_path / "ours/model.safetensors"))


def test_fp8_arrives_rounded_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = arrived(FIXTURES / "24-fp8")
    words = "fp8 codes × scales are rounded once to bfloat16"
    # Handlers that other tests left may have shown a record twice.
    assert len({id(record) for record in caplog.records if words in record.getMessage()}) == 1
    export_legacy(FIXTURES / "24-fp8", tmp_path / "ours", rounds=True)
    assert same_bits(found, load_file(tmp_path / "ours/model.safetensors"))


def test_on_gpus_fp8_arrives_as_codes_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    foreign = Foreign.open(str(FIXTURES / "24-fp8"))
    assert {fmt.spec for fmt in foreign.formats.values()} == {"nm/2:4/fp8:row"}
    found = arrived(FIXTURES / "24-fp8")
    assert "rounded once" not in caplog.text
    export_legacy(FIXTURES / "24-fp8", tmp_path / "ours")
    assert same_bits(found, load_file(tmp_path / "ours/model.safetensors"))
    fine = altered(tmp_path, "24-fp8", put("weight_scale", lambda t: t.float() * 1.001))
    assert {fmt.spec for fmt in Foreign.open(str(fine)).formats.values()} == {"nm/2:4"}
    assert "rounded once" in caplog.text


def test_fp8_arrives_as_it_is_where_products_are_exact(tmp_path: Path) -> None:
    def round_scales(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith("weight_scale"):
                tensors[name] = torch.full_like(tensors[name], 2**-9)

    folder = altered(tmp_path, "24-fp8", round_scales)
    export_legacy(folder, tmp_path / "ours", rounds=True)
    assert same_bits(arrived(folder), load_file(tmp_path / "ours/model.safetensors"))


@pytest.mark.parametrize(
    ("fixture", "change", "match"),
    [
        ("24-int8-group", put("weight_scale", lambda t: t.float() * 1.001), "do not fit bfloat16"),
        ("24-int8-group", put("weight_scale", lambda t: -t), "scale is not positive"),
        ("marlin-int4", put("scale_packed", lambda t: t * 1.001), "do not fit bfloat16"),
        ("24-fp8", put("weight_scale", lambda t: t * 0), "scale is not positive"),
    ],
)
def test_scales_are_refused_before_anything_is_started(
    fixture: str, change: Callable[[Tensors], object], match: str, tmp_path: Path
) -> None:
    with pytest.raises(GblmError, match=match):
        Foreign.open(str(altered(tmp_path, fixture, change)))


def test_plain_weights_arrive_as_they_are() -> None:
    stored = load_file(FIXTURES / "dense/model.safetensors")
    assert same_bits(arrived(FIXTURES / "dense"), stored)
    formats = Foreign.open(str(FIXTURES / "dense")).formats
    assert {fmt.spec for fmt in formats.values()} == {"dense/dense"}
    assert len(formats) == 7


def test_plain_folders_are_held_against_their_config(tiny: Path, tmp_path: Path) -> None:
    formats = Foreign.open(str(tiny)).formats
    assert {fmt.spec for fmt in formats.values()} == {"dense/dense"}
    assert len(formats) == 14
    folder = Path(shutil.copytree(tiny, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GblmError, match=r"model.norm.weight is missing"):
        Foreign.open(str(folder))


@pytest.mark.parametrize(
    ("fixture", "change", "match"),
    [
        ("bitmask", drop("bitmask"), "up_proj.bitmask is missing"),
        ("24-bitmask", lambda t: [t.pop(f"{UP}.{p}") for p in ("shape", "compressed", "bitmask")],
         "up_proj.weight is missing"),
        ("dense", drop("weight"), "up_proj.weight is missing"),
        ("24-bitmask", lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
        ("bitmask", put("bitmask", lambda t: ~t), "do not count the bits"),
        ("24-bitmask", put("bitmask", lambda t: t | 1), "does not keep two of row"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_cannot_be_served(
    fixture: str, change: Callable[[Tensors], object], match: str, tmp_path: Path
) -> None:
    with pytest.raises(GblmError, match=match):
        arrived(altered(tmp_path, fixture, change))


def test_shards_that_no_index_lists_are_refused(tiny: Path, tmp_path: Path) -> None:
    for folder in (FIXTURES / "bitmask", tiny):
        copy = Path(shutil.copytree(folder, tmp_path / folder.name))
        save_file({f"{UP}.values": torch.ones(2)}, copy / "more.safetensors")
        with pytest.raises(GblmError, match=r"more.safetensors belongs to no index"):
            Foreign.open(str(copy))


def weight(keep: str, columns: int = 64) -> torch.Tensor:
    """[16, columns] bfloat16 whose zeros follow a pattern."""
    dense = torch.randn(16, columns, generator=torch.Generator().manual_seed(1)).bfloat16()
    if keep == "all":
        return dense
    if keep == "most":
        dense[0] = 0
        return dense
    fmt = from_spec({"2:4": "nm/2:4", "1:4": "nm/1:4"}.get(keep, f"bitmask/{keep}"))
    return torch.where(fmt.pattern.keep(dense.float().abs(), "row"), dense, 0)


@pytest.mark.parametrize(
    ("keep", "columns", "spec"),
    [
        ("2:4", 64, "nm/2:4"),
        ("1:4", 64, "nm/1:4"),
        ("0.5", 64, "bitmask/0.5"),
        ("0.97", 256, "bitmask/0.9"),
        ("most", 64, "bitmask/0.1"),
        ("all", 64, "dense/dense"),
        ("0.04", 64, "dense/dense"),
        ("2:4", 60, "dense/dense"),
    ],
)
def test_the_format_is_found_from_the_zeros(keep: str, columns: int, spec: str) -> None:
    plain = weight(keep, columns)
    # A mask that keeps zeros says nothing about the pattern.
    whole = SparseWeight(plain, torch.ones(plain.shape, dtype=torch.bool))
    fmt, found = settle("w", whole, FLOAT)
    assert fmt.spec == spec
    assert torch.equal(found.weight, plain)
    if spec != "dense/dense":
        assert torch.equal(fmt.expand(fmt.pack("w", found)), plain)


def test_codes_stay_codes_whatever_their_zeros() -> None:
    values = ValueType("int8", 32)
    for keep, spec in (("2:4", "nm/2:4/int8:32"), ("all", "bitmask/0/int8:32")):
        plain = weight(keep)
        fmt, found = settle("w", quantize(plain, plain != 0, values), values)
        assert fmt.spec == spec
        assert found.codes is not None


@pytest.mark.vllm
@pytest.mark.parametrize("fixture", [*PACKED, "24-fp8", "dense"])
def test_sparse_checkpoints_are_claimed(fixture: str) -> None:
    pytest.importorskip("vllm")
    from gblm.serve.vllm_plugin.config import SparseConfig

    for user in (None, "gblm", "compressed-tensors"):
        claim = SparseConfig.override_quantization_method(quantization(fixture), user)
        assert claim == "gblm"
    assert SparseConfig.override_quantization_method(quantization(fixture), "fp8") is None
    assert SparseConfig.from_config(quantization(fixture)).manifest is None


HOSTILE = ("os:system", "../x", "__import__('os')", "sparse_bitmask", "", None, 7, ["marlin-24"],
           {"format": "dense"})  # fmt: skip


@pytest.mark.vllm
def test_everything_else_is_left_to_vllm() -> None:
    pytest.importorskip("vllm")
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
        CompressedTensorsConfig,
    )

    from gblm.serve.vllm_plugin.config import SparseConfig

    sparse = quantization("bitmask")
    served = [
        ORDINARY,
        ORDINARY | {"format": "pack-quantized"},
        ORDINARY | {"sparsity_config": {}},
        ORDINARY | {"sparsity_config": {"format": "dense", "ignore": ["lm_head"]}},
        sparse
        | {"sparsity_config": sparse["sparsity_config"] | {"format": "dense", "targets": []}},
    ]
    for config in served:
        assert SparseConfig.override_quantization_method(config, None) is None
        CompressedTensorsConfig.from_config(json.loads(json.dumps(config)))  # vLLM takes it
    for name in HOSTILE:
        config = sparse | {"sparsity_config": sparse["sparsity_config"] | {"format": name}}
        assert SparseConfig.override_quantization_method(config, None) is None
        with pytest.raises((DeprecationWarning, ValueError)):
            CompressedTensorsConfig.from_config(config)
    for config in ({"quant_method": "fp8"}, {"quant_method": "gblm"}, {"sparsity_config": 3}):
        assert SparseConfig.override_quantization_method(config, None) is None


@pytest.mark.vllm
def test_an_incomplete_checkpoint_is_refused_before_a_process_loads_it(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    from gblm.serve.vllm_plugin.config import SparseConfig

    folder = altered(tmp_path, "bitmask-0.8", lambda t: t.pop("model.norm.weight.bitmask"))
    config = SparseConfig.from_config(quantization("bitmask-0.8"))
    with pytest.raises(GblmError, match=r"model.norm.weight.bitmask is missing"):
        config.maybe_update_config(str(folder))
    with pytest.raises(GblmError, match=r"model.norm.weight.bitmask is missing"):
        check(Server(folder))


@pytest.mark.vllm
def test_mappers_keep_the_model_on_whichever_side_they_are_joined() -> None:
    pytest.importorskip("vllm")
    from vllm.model_executor.models.utils import WeightsMapper

    from gblm.serve.vllm_plugin.config import SparseConfig

    config = SparseConfig.from_config(quantization("bitmask-0.8"))
    config.maybe_update_config(str(FIXTURES / "bitmask-0.8"))
    mapper = WeightsMapper(orig_to_new_stacked={".up_proj": (".gate_up_proj", 1)})
    mapper |= config.get_checkpoint_weight_mapper()
    mapper |= WeightsMapper(orig_to_new_prefix={"model.": ""})
    stored = load_file(FIXTURES / "bitmask-0.8/model.safetensors")
    names = {name for name, _ in mapper.apply(stored.items())}
    assert "layers.0.mlp.gate_up_proj.row_offsets" in names
    assert {"norm.weight", "embed_tokens.weight", "lm_head.weight"} < names
    assert not [name for name in names if "compressed" in name]


@pytest.mark.vllm
@pytest.mark.parametrize("fixture", [*TRUTH, "24-fp8", "marlin-int8"])
def test_serve_takes_them_as_they_are(fixture: str) -> None:
    pytest.importorskip("vllm")
    check(Server(FIXTURES / fixture))
    check(Server(FIXTURES / fixture, backend="reference"))


@pytest.mark.vllm
def test_zeros_are_packed_when_the_user_asks(
    pack_tiny: Pack, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("vllm")
    caplog.set_level("INFO", "gblm")
    export_dense(pack_tiny(), tmp_path / "zeros")
    check(Server(tiny))
    assert "--pack" not in caplog.text
    check(Server(tmp_path / "zeros"))
    assert "about 50 % of the weights are zero: --pack serves it packed" in caplog.text
    with pytest.raises(InputError, match="--pack packs a dense one"):
        check(Server(tmp_path / "zeros", backend="reference"))
    packing = Server(tmp_path / "zeros", backend="reference", pack=True)
    check(packing)
    words = command(packing)
    assert words[words.index("--quantization") + 1] == "gblm"
    assert "--quantization" not in command(Server(tmp_path / "zeros"))


@pytest.mark.vllm
def test_other_quantised_models_are_not_packed(tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    folder = Path(shutil.copytree(tiny, tmp_path / "m"))
    for fields, match in ((ORDINARY, "no sparsity_config"), ({"quant_method": "fp8"}, "neither")):
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = fields
        (folder / "config.json").write_text(json.dumps(config))
        assert not is_legacy(config)
        with pytest.raises(GblmError, match=match):
            check(Server(folder, pack=True))


def test_a_pruned_model_is_packed_already(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gblm.commands.serve import command as serve_command

    with pytest.raises(UsageError, match="leave --pack out"):
        serve_command.main([str(tiny), "--pack", "--prune", "gblm 2:4"], standalone_mode=False)
