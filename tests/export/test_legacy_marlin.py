"""`gblm export legacy` on marlin-24, which the old library wrote but could not read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from legacy_cases import (
    FIXTURES,
    UP,
    altered,
    drop,
    put,
    sha256,
)
from torch import Tensor

from gblm.checkpoint.inspect import verify
from gblm.errors import CheckpointError, InputError
from gblm.export.legacy import export_legacy
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader


@pytest.mark.parametrize(
    "fixture", ["marlin-int4", "marlin-int8", "marlin-int4-own", "marlin-int8-own"]
)
def test_marlin_is_taken_apart_into_the_codes_it_was_made_from(
    fixture: str, tmp_path: Path
) -> None:
    export_legacy(FIXTURES / fixture, tmp_path / "ours")
    verify(ModelFolder.open(tmp_path / "ours"))
    codes_and_scales = json.loads((FIXTURES / f"{fixture}.json").read_text())
    with PackedReader(ModelFolder.open(tmp_path / "ours")) as ours:
        assert ours.linears.keys() == codes_and_scales.keys()
        kinds = {linear.fmt.spec for linear in ours.linears.values()}
        for name, (codes, scales) in codes_and_scales.items():
            weight = ours.linears[name].fmt.unpack(ours.parts(name))
            assert weight.codes is not None
            assert weight.scales is not None
            assert sha256(weight.codes) == codes
            assert sha256(weight.scales.half()) == scales
    rows = f"nm/2:4/{fixture[7:11]}:row"
    assert kinds == ({rows, "nm/2:4/int4:128"} if fixture == "marlin-int4" else {rows})


@pytest.mark.parametrize(("bits", "rows"), [(4, 113), (8, 31)])
def test_scales_of_the_old_library_itself_give_the_least_codes(
    bits: int, rows: int, tmp_path: Path
) -> None:
    """Of 448 rows many have such a code, which has no opposite, and all of them are kept."""
    export_legacy(FIXTURES / f"marlin-int{bits}-own", tmp_path / "ours")
    found = 0
    with PackedReader(ModelFolder.open(tmp_path / "ours")) as ours:
        for name, linear in ours.linears.items():
            codes = linear.fmt.unpack(ours.parts(name)).codes
            assert codes is not None
            found += int((codes == -(2 ** (bits - 1))).any(dim=1).sum())
    assert found == rows


def no_pair(meta: Tensor) -> Tensor:
    """The first group of four keeps its first place twice."""
    meta[0, 0] = meta[0, 0] >> 4 << 4
    return meta


MARLIN = {
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
    "other layout": (
        lambda t: t.update({f"{UP}.bitmask": torch.zeros(1)}), "is no part of marlin-24",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MARLIN)
def test_marlin_that_is_not_exact_or_damaged_is_refused(kind: str, tmp_path: Path) -> None:
    change, sentence = MARLIN[kind]
    with pytest.raises(InputError, match=sentence):
        export_legacy(altered(tmp_path, "marlin-int4", change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_marlin_without_settings_is_refused(tmp_path: Path) -> None:
    folder = altered(tmp_path, "marlin-int4", config=lambda c: c.pop("config_groups"))
    with pytest.raises(CheckpointError, match="config_groups are no groups of settings"):
        export_legacy(folder, tmp_path / "out")
