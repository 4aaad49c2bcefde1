from __future__ import annotations

from typing import Any

import pytest

from gblm.errors import CheckpointError
from gblm.sparse.formats.manifest import Group, Manifest, group_targets

GOOD: dict[str, Any] = {
    "quant_method": "gblm",
    "version": 1,
    "groups": [{"format": "nm", "pattern": "2:4", "targets": ["model.layers.*.mlp.up_proj"]}],
}


def test_manifest_round_trips() -> None:
    manifest = Manifest.from_config(GOOD)
    assert Manifest.from_config(manifest.to_config()) == manifest
    fmt = manifest.format_of("model.layers.7.mlp.up_proj")
    assert fmt is not None
    assert fmt.spec == "nm/2:4"
    assert manifest.format_of("lm_head") is None


def test_float_values_are_not_written_so_old_manifests_read_and_write_the_same() -> None:
    assert Manifest.from_config(GOOD).to_config() == GOOD
    groups = [GOOD["groups"][0] | {"values": "int8:64"}]
    manifest = Manifest.from_config(GOOD | {"groups": groups})
    assert manifest.to_config()["groups"] == groups
    fmt = manifest.format_of("model.layers.7.mlp.up_proj")
    assert fmt is not None
    assert fmt.spec == "nm/2:4/int8:64"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"quant_method": "gptq"}, "no packed weights of gblm"),
        ({"version": 2}, "version 2 is not supported"),
        ({"version": None}, "version None"),
        ({"groups": []}, "groups"),
        ({"extra": 1}, "extra"),
        ({"groups": [{"format": "zip", "pattern": "2:4", "targets": ["a"]}]}, "'zip' is unknown"),
        ({"groups": [{"format": "nm", "pattern": "8:4", "targets": ["a"]}]}, "8:4"),
        ({"groups": [{"format": "nm", "pattern": "2:4", "targets": ["a/../b"]}]}, "no module name"),
        ({"groups": [{"format": "nm", "pattern": "2:4", "targets": []}]}, "targets"),
        ({"groups": "nm"}, "groups"),
        ({"groups": [GOOD["groups"][0] | {"values": "int8"}]}, "leave the group size open"),
        ({"groups": [GOOD["groups"][0] | {"values": "int9:64"}]}, "'int9:64' are unknown"),
    ],
)
def test_bad_manifests_are_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        Manifest.from_config(GOOD | change)


@pytest.mark.parametrize("value", [None, [], "gblm", 3])
def test_something_else_is_refused(value: Any) -> None:
    with pytest.raises(CheckpointError):
        Manifest.from_config(value)


def test_targets_match_exactly_the_chosen_modules() -> None:
    every = [f"model.layers.{i}.{n}" for i in range(12) for n in ("a.q", "a.k")]
    assert group_targets(every, every) == ("model.layers.*.a.q", "model.layers.*.a.k")
    chosen = [name for name in every if name != "model.layers.1.a.q"]
    targets = group_targets(chosen, every)
    manifest = Manifest(groups=(Group(format="nm", pattern="2:4", targets=targets),))
    assert [name for name in every if manifest.format_of(name)] == chosen
