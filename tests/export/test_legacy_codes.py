"""`gblm export legacy` on codes and scales: exactly or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from legacy_cases import (
    FIXTURES,
    UP,
    Tensors,
    altered,
    drop,
    put,
    same_bits,
    scale,
    settings,
)
from safetensors.torch import load_file

from gblm.checkpoint.inspect import inspect, verify
from gblm.errors import InputError
from gblm.export.dense import export_dense
from gblm.export.legacy import export_legacy
from gblm.model.folder import ModelFolder


@pytest.mark.parametrize("fixture", ["24-int8-channel", "24-int8-group"])
def test_int8_codes_and_scales_become_ours_and_back(fixture: str, tmp_path: Path) -> None:
    export_legacy(FIXTURES / fixture, tmp_path / "ours")
    verify(ModelFolder.open(tmp_path / "ours"))
    kind = "int8:row" if fixture == "24-int8-channel" else "int8:32"
    assert [g["dtype"] for g in inspect(ModelFolder.open(tmp_path / "ours"))["groups"]] == [kind]
    export_dense(ModelFolder.open(tmp_path / "ours"), tmp_path / "dense")
    dense, unpacked = (
        load_file(f)
        for f in (tmp_path / "dense/model.safetensors", FIXTURES / f"{fixture}.safetensors")
    )
    assert same_bits({n: dense[n] for n in unpacked}, unpacked)


def test_the_least_code_stays_itself(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.compressed"][0, 0] = -128

    folder = altered(tmp_path, "24-int8-channel", change)
    export_legacy(folder, tmp_path / "ours")
    verify(ModelFolder.open(tmp_path / "ours"))
    assert load_file(tmp_path / "ours/model.safetensors")[f"{UP}.values"][0, 0] == -128


def test_only_weights_are_converted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.input_scale"] = torch.ones(1)

    with caplog.at_level("WARNING"):
        export_legacy(altered(tmp_path, "24-int8-channel", change), tmp_path / "ours")
    assert "activations stay floating" in caplog.text
    assert f"{UP}.input_scale" not in load_file(tmp_path / "ours/model.safetensors")


def every_scale(value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update(
        {name: value(t) for name, t in tensors.items() if name.endswith("weight_scale")}
    )


@pytest.mark.parametrize("kind", ["channel", "tensor"])
def test_fp8_becomes_the_floats_that_it_stands_for(kind: str, tmp_path: Path) -> None:
    power = every_scale(lambda t: torch.full_like(t, 0.0078125))
    single = every_scale(lambda t: torch.full((1,), 0.0078125, dtype=t.dtype))
    strategy = settings(strategy="tensor") if kind == "tensor" else None
    folder = altered(tmp_path, "24-fp8", single if kind == "tensor" else power, strategy)
    export_legacy(folder, tmp_path / "ours")
    verify(ModelFolder.open(tmp_path / "ours"))
    theirs, ours = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "ours"))
    for name in [n.removesuffix(".compressed") for n in theirs if n.endswith(".compressed")]:
        exact = theirs[f"{name}.compressed"].double() * 0.0078125
        assert ours[f"{name}.values"].double().equal(exact + 0.0)
        assert ours[f"{name}.bitmask"].equal(theirs[f"{name}.bitmask"])


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_fp8_codes_of_nan_are_refused(byte: int, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.compressed"].view(torch.uint8)[0, 0] = byte

    with pytest.raises(InputError, match=r"up_proj\.weight holds NaN"):
        export_legacy(altered(tmp_path, "24-fp8", change), tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp8_is_rounded_once(
    dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = altered(
        tmp_path, "24-fp8",
        lambda t: t.update({n: (x.float() * 1.003).to(dtype) for n, x in t.items()
                            if n.endswith("weight_scale")}),
    )  # fmt: skip
    report = export_legacy(folder, tmp_path / "ours")
    assert report["rounded"] == "bfloat16"
    assert "rounded once to bfloat16 (relative error at most 2^-8" in caplog.text
    recipe = json.loads((tmp_path / "ours/recipe.json").read_text())
    assert recipe["options"] == {"legacy": "sparse-24-bitmask", "rounded": "bfloat16"}
    verify(ModelFolder.open(tmp_path / "ours"))
    theirs, ours = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "ours"))
    for name in [n.removesuffix(".compressed") for n in theirs if n.endswith(".compressed")]:
        exact = theirs[f"{name}.compressed"].double() * theirs[f"{name}.weight_scale"].double()
        values = ours[f"{name}.values"]
        assert values.dtype == torch.bfloat16
        assert bool(((values.double() - exact).abs() <= 2.0**-8 * exact.abs()).all())
        assert ours[f"{name}.bitmask"].equal(theirs[f"{name}.bitmask"])


def test_the_command_says_that_it_rounds(gblm: Callable[..., Outcome], tmp_path: Path) -> None:
    done = gblm("export", "legacy", FIXTURES / "24-fp8", "--output", tmp_path / "out")
    assert done.code == 0, done
    assert "fp8 codes × scales rounded once to bfloat16" in done.out


CODES: dict[str, tuple[Any, Any, str]] = {
    "fine scales": (scale(lambda t: t.float() * 1.001), None, "do not fit bfloat16"),
    "no scales": (drop("weight_scale"), None, "without scales"),
    "scale zero": (scale(lambda t: t * 0), None, "a scale is not positive"),
    "scale infinite": (scale(lambda t: t / 0), None, "a scale is not positive"),
    "scales of other rows": (scale(lambda t: t[1:]), None, "are not what config_groups says"),
    "scales of groups": (scale(lambda t: t.repeat(1, 2)), None, "are not what config_groups says"),
    "scales of integers": (scale(lambda t: t.int()), None, "are not what config_groups says"),
    "codes of floats": (
        put("compressed", lambda t: t.float()), None, "are not what config_groups says",
    ),
    "zero points": (
        lambda t: t.update({f"{UP}.weight_zero_point": torch.ones(1)}), None, "asymmetric codes",
    ),
    "column order": (
        lambda t: t.update({f"{UP}.weight_g_idx": torch.ones(1)}), None, "another column order",
    ),
    "scales of a dense weight": (
        lambda t: t.update({"lm_head.weight_scale": torch.ones(1)}), None, "not stored sparse",
    ),
    "asymmetric": (None, settings(symmetric=False), "symmetric 'False' are not converted"),
    "four bits": (None, settings(num_bits=4), "num_bits '4' are not converted"),
    "reordered": (None, settings(actorder="group"), "actorder 'group' are not converted"),
    "blocks": (None, settings(strategy="block"), "scales by 'block' are not converted"),
    "group of 0": (None, settings(strategy="group", group_size=0), "scales by 'group'"),
    "no settings": (None, lambda c: c.update(config_groups={"a": {}}), "no settings for weights"),
    "groups of text": (None, lambda c: c.update(config_groups=["a"]), "no groups of settings"),
    "hostile format": (None, lambda c: c.update(format="os:system"), "'os:system' are not convert"),
    "packed int4": (None, lambda c: c.update(format="pack-quantized"), "'pack-quantized' are not"),
    "KV cache": (None, lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "KV cache"),
    "stored dense": (
        None, lambda c: c["sparsity_config"].update(format="dense"), "no sparse checkpoint",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CODES)
def test_codes_that_are_not_exact_or_damaged_are_refused(kind: str, tmp_path: Path) -> None:
    change, config, sentence = CODES[kind]
    with pytest.raises(InputError, match=sentence):
        export_legacy(altered(tmp_path, "24-int8-channel", change, config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_groups_that_we_have_not_are_refused(tmp_path: Path) -> None:
    folder = altered(
        tmp_path, "24-int8-group",
        lambda t: t.update({n: x.repeat(1, 2) for n, x in t.items() if n.endswith("_scale")}),
        settings(group_size=16),
    )  # fmt: skip
    with pytest.raises(InputError, match="groups of 16 columns cannot be stored; 32, 64"):
        export_legacy(folder, tmp_path / "out")


def test_one_scale_for_a_whole_tensor_is_that_of_every_row(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name] = torch.full((1,), 0.0078125, dtype=torch.bfloat16)

    folder = altered(tmp_path, "24-int8-channel", change, settings(strategy="tensor"))
    export_legacy(folder, tmp_path / "ours")
    verify(ModelFolder.open(tmp_path / "ours"))
    ours = load_file(tmp_path / "ours/model.safetensors")
    assert ours[f"{UP}.scales"].tolist() == [[0.0078125]] * 64
