"""Damaged, hostile or inexact files of compressed-tensors: one sentence, never a weight."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from legacy_cases import UP, Change, Settings, altered, drop, each_scale, put, settings
from torch import Tensor

from gblm.errors import CheckpointError, InputError
from gblm.export.legacy import LegacyReader, export_legacy
from gblm.export.legacy_layouts import LAYOUTS
from gblm.model.folder import ModelFolder

BITMASK = LAYOUTS["sparse-bitmask"]


def flip(tensor: Tensor) -> Tensor:
    """One bit of the first byte that has a set bit and a clear one."""
    return tensor ^ (torch.arange(tensor.numel()).reshape(tensor.shape) == 9).to(tensor.dtype)


def scale(value: Callable[[Tensor], Tensor]) -> Change:
    return put("weight_scale", value)


def add(name: str, tensor: Tensor | None = None) -> Change:
    return lambda t: t.update({name: torch.ones(1) if tensor is None else tensor})


def no_pair(meta: Tensor) -> Tensor:
    """The first group of four keeps its first place twice."""
    meta[0, 0] = meta[0, 0] >> 4 << 4
    return meta


def nan_code(byte: int) -> Change:
    def change(codes: Tensor) -> Tensor:
        codes.view(torch.uint8)[0, 0] = byte
        return codes

    return put("compressed", change)


# Fixture → what is done to its tensors, and words of the refusal.
TENSORS: dict[str, dict[str, tuple[Change, str]]] = {
    "bitmask": {
        "part missing": (drop("bitmask"), "up_proj.bitmask is missing"),
        "all parts missing": (
            lambda t: [t.pop(f"{UP}.{part}") for part in BITMASK.parts],
            "up_proj.weight is missing",
        ),
        "shape of other size": (put("shape", lambda t: t + 8), "needs"),
        "shape not positive": (put("shape", lambda t: t * 0), r"\[0, 0\] is no shape"),
        "shape negative": (put("shape", lambda t: -t), "is no shape"),
        "shape huge": (put("shape", lambda t: t + 2**62), "needs"),
        "shape transposed": (put("shape", lambda t: t.flip(0)), "needs"),
        "shape of three": (put("shape", lambda t: torch.ones(3, dtype=t.dtype)), "holds no shape"),
        "shape of floats": (put("shape", lambda t: t.float()), "holds no shape"),
        "bitmask of other width": (put("bitmask", lambda t: t[:, :-1]), "needs"),
        "bitmask of other dtype": (put("bitmask", lambda t: t.to(torch.int8)), "needs"),
        "bit flipped": (put("bitmask", flip), "do not count the bits"),
        "offsets shifted": (
            put("row_offsets", lambda t: t + 1), "do not count the bits before row 0",
        ),
        "offsets negative": (put("row_offsets", lambda t: -t), "do not count the bits"),
        "offsets of int32": (put("row_offsets", lambda t: t.int()), "needs"),
        "offset missing": (put("row_offsets", lambda t: t[:-1]), "needs"),
        "value missing": (put("compressed", lambda t: t[:-1]), "values for"),
        "value too many": (put("compressed", lambda t: torch.cat([t, t[:1]])), "values for"),
        "more values than places": (put("compressed", lambda t: t.repeat(9)), "values for"),
        "values of integers": (put("compressed", lambda t: t.int()), "floats are needed"),
        "stored twice": (
            lambda t: t.update({f"{UP}.weight": torch.zeros(64, 32, dtype=torch.bfloat16)}),
            "stored twice",
        ),
        "stored twice in parts": (
            lambda t: t.update(
                {f"{UP}.weight.{p}": t[f"{UP}.{p}"].clone() for p in BITMASK.parts}
            ),
            "stored twice",
        ),
        "another size than the model": (
            lambda t: t.update(
                {f"{UP}.{p}": t[f"{UP.replace('up', 'down')}.{p}"] for p in BITMASK.parts}
            ),
            "config.json makes it",
        ),
    },
    "24-bitmask": {
        "bit flipped": (put("bitmask", flip), "does not keep two of row"),
        "value missing": (put("compressed", lambda t: t[:, :-1]), "needs"),
        "shape of one": (put("shape", lambda t: t[:1, 0]), "is no shape of sparse-24-bitmask"),
        "other layout": (
            add(f"{UP}.row_offsets", torch.zeros(64, dtype=torch.int64)),
            "is no part of sparse-24-bitmask",
        ),
    },
    "24-int8-channel": {
        "fine scales": (scale(lambda t: t.float() * 1.001), "do not fit bfloat16"),
        "no scales": (drop("weight_scale"), "without scales"),
        "scale zero": (scale(lambda t: t * 0), "a scale is not positive"),
        "scale infinite": (scale(lambda t: t / 0), "a scale is not positive"),
        "scales of other rows": (scale(lambda t: t[1:]), "are not what config_groups says"),
        "scales of groups": (scale(lambda t: t.repeat(1, 2)), "are not what config_groups says"),
        "scales of integers": (scale(lambda t: t.int()), "are not what config_groups says"),
        "codes of floats": (
            put("compressed", lambda t: t.float()), "are not what config_groups says",
        ),
        "zero points": (add(f"{UP}.weight_zero_point"), "asymmetric codes"),
        "column order": (add(f"{UP}.weight_g_idx"), "another column order"),
        "scales of a dense weight": (add("lm_head.weight_scale"), "not stored sparse"),
    },
    "24-fp8": {
        "code of NaN": (nan_code(0x7F), r"up_proj\.weight holds NaN"),
        "code of −NaN": (nan_code(0xFF), r"up_proj\.weight holds NaN"),
    },
    "marlin-int4": {
        "place twice": (put("meta", no_pair), "does not keep two of row 0, columns 0"),
        "fine scales": (put("scale_packed", lambda t: t * 1.001), "do not fit bfloat16"),
        "scale zero": (put("scale_packed", lambda t: t * 0), "a scale is not positive"),
        "scales of bf16": (put("scale_packed", lambda t: t.bfloat16()), "no parts of one weight"),
        "scales of groups": (put("scale_packed", lambda t: t.repeat(4, 1)), "config_groups says"),
        "scales of 3 groups": (put("scale_packed", lambda t: t.repeat(3, 1)), "no parts of one"),
        "no scales": (drop("scale_packed"), "up_proj.scale_packed is missing"),
        "half the meta": (put("meta", lambda t: t[:1]), "no parts of one weight"),
        "meta of int32": (put("meta", lambda t: t.int()), "no parts of one weight"),
        "half the words": (put("weight_packed", lambda t: t[:, ::2]), "no parts of one weight"),
        "no words": (put("weight_packed", lambda t: t[:0]), "no parts of one weight"),
        "flat": (put("weight_packed", lambda t: t.flatten()), "no parts of one weight"),
        "other layout": (add(f"{UP}.bitmask"), "is no part of marlin-24"),
    },
}  # fmt: skip
# Fixture → what is done to its settings, and words of the refusal.
CONFIGS: dict[str, dict[str, tuple[Settings, str]]] = {
    "bitmask": {
        f"format {name!r}": (
            lambda c, n=name: c["sparsity_config"].update(format=n),
            "names no sparse format of compressed-tensors that is converted: sparse-24",
        )
        for name in ("os:system", "sparse_bitmask", "../x", "", None, 7, ["sparse-bitmask"], {})
    },
    "24-int8-channel": {
        "asymmetric": (settings(symmetric=False), "symmetric 'False' are not converted"),
        "four bits": (settings(num_bits=4), "num_bits '4' are not converted"),
        "reordered": (settings(actorder="group"), "actorder 'group' are not converted"),
        "blocks": (settings(strategy="block"), "scales by 'block' are not converted"),
        "group of 0": (settings(strategy="group", group_size=0), "scales by 'group'"),
        "no settings": (lambda c: c.update(config_groups={"a": {}}), "no settings for weights"),
        "groups of text": (lambda c: c.update(config_groups=["a"]), "no groups of settings"),
        "hostile format": (lambda c: c.update(format="os:system"), "'os:system' are not convert"),
        "packed int4": (lambda c: c.update(format="pack-quantized"), "'pack-quantized' are not"),
        "KV cache": (lambda c: c.update(kv_cache_scheme={"num_bits": 8}), "KV cache"),
        "stored dense": (
            lambda c: c["sparsity_config"].update(format="dense", sparsity_structure=None),
            "the last of floats and 2:4 codes only",
        ),
        "masks called dense": (
            lambda c: c["sparsity_config"].update(format="dense"), "is no part of dense",
        ),
    },
    "marlin-int4": {
        "no settings": (
            lambda c: c.pop("config_groups"), "config_groups are no groups of settings",
        ),
    },
}  # fmt: skip


def cases(table: dict[str, dict[str, tuple[object, str]]]) -> list[tuple[str, str]]:
    return [(fixture, kind) for fixture, kinds in table.items() for kind in kinds]


@pytest.mark.parametrize(("fixture", "kind"), cases(TENSORS))
def test_tensors_that_are_damaged_or_not_exact_are_refused(
    fixture: str, kind: str, tmp_path: Path
) -> None:
    change, sentence = TENSORS[fixture][kind]
    with pytest.raises(InputError, match=sentence):
        export_legacy(altered(tmp_path, fixture, change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("fixture", "kind"), cases(CONFIGS))
def test_settings_that_are_not_ours_are_refused(fixture: str, kind: str, tmp_path: Path) -> None:
    config, sentence = CONFIGS[fixture][kind]
    with pytest.raises(InputError, match=sentence):
        export_legacy(altered(tmp_path, fixture, config=config), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_groups_that_we_have_not_are_refused(tmp_path: Path) -> None:
    twice = each_scale(lambda t: t.repeat(1, 2))
    folder = altered(tmp_path, "24-int8-group", twice, settings(group_size=16))
    with pytest.raises(InputError, match="groups of 16 columns cannot be stored; 32, 64"):
        export_legacy(folder, tmp_path / "out")


def test_bits_behind_the_last_column_are_damage() -> None:
    headers = {
        "bitmask": ((1, 1), torch.uint8),
        "compressed": ((1,), torch.float32),
        "row_offsets": ((1,), torch.int64),
    }
    tensor = BITMASK.describe("sparse-bitmask", "x", headers, [1, 5])
    parts = {"compressed": torch.ones(1), "row_offsets": torch.zeros(1, dtype=torch.int64)}
    good = tensor.raw({"bitmask": torch.tensor([[16]], dtype=torch.uint8), **parts})
    assert good.mask.tolist() == [[False] * 4 + [True]]
    with pytest.raises(CheckpointError, match="bits behind column 4"):
        tensor.raw({"bitmask": torch.tensor([[32]], dtype=torch.uint8), **parts})


@pytest.mark.parametrize("seed", range(15))
def test_a_damaged_header_is_never_a_crash(seed: int, tmp_path: Path) -> None:
    folder = altered(tmp_path, ("bitmask", "24-int8-group", "marlin-int8")[seed % 3])
    path, draw = folder / "model.safetensors", np.random.default_rng(seed)
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    for place in draw.integers(0, 8 + length, size=2):
        data[place] = draw.integers(256)
    path.write_bytes(bytes(data[: len(data) if seed % 5 else draw.integers(len(data))]))
    try:
        with LegacyReader(ModelFolder.open(folder)) as reader:
            for name in reader:
                assert tuple(reader.tensor(name).shape) == reader.headers[name][0]
    except InputError:
        pass  # one sentence
