"""`gblm export legacy` on files of compressed-tensors; see tests/legacy/write_fixtures.py."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Outcome
from safetensors.torch import load_file, save_file
from torch import Tensor

from gblm.checkpoint.inspect import inspect
from gblm.checkpoint.packed_folder import PackedReader
from gblm.checkpoint.verify import verify
from gblm.commands.export import LAYOUTS
from gblm.errors import CheckpointError, InputError, PatternError, UsageError
from gblm.export.dense import export_dense
from gblm.export.legacy import export_legacy
from gblm.export.legacy_bitmask import PARTS, BitmaskTensor
from gblm.export.legacy_reader import LegacyReader
from gblm.folder import LEGACY_FORMATS
from gblm.serve.launch import Server, check

Pack = Callable[..., Path]
Tensors = dict[str, Tensor]

FIXTURES = Path(__file__).parent.parent / "legacy/fixtures"
# Fixture → the weights before the old library packed them, and the pattern we store.
TRUTH = {
    "bitmask": ("unstructured", "bitmask"),
    "bitmask-0.8": ("unstructured", "bitmask"),
    "24-bitmask": ("2of4", "nm"),
    "dense": ("2of4", "nm"),
}
UP = "model.layers.0.mlp.up_proj"


def truth(fixture: str) -> Tensors:
    return load_file(FIXTURES / f"{TRUTH[fixture][0]}.safetensors")


def same_bits(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype
        and a[n].shape == b[n].shape
        and a[n].flatten().view(torch.uint8).equal(b[n].flatten().view(torch.uint8))
        for n in a
    )


def old_unpack(tensors: Tensors, prefix: str) -> Tensor:
    """What the old library makes of the parts: rows of bits, then values into the places."""
    shape = [int(n) for n in tensors[f"{prefix}.shape"].flatten()]
    bits = np.unpackbits(
        tensors[f"{prefix}.bitmask"].numpy(), axis=-1, count=shape[-1], bitorder="little"
    )
    values = iter(tensors[f"{prefix}.compressed"].flatten().tolist())
    dense = [[next(values) if bit else 0.0 for bit in row] for row in bits]
    return torch.tensor(dense, dtype=tensors[f"{prefix}.compressed"].dtype)


def altered(
    tmp_path: Path,
    fixture: str,
    change: Callable[[Tensors], object] | None = None,
    config: Callable[[dict[str, Any]], object] | None = None,
) -> Path:
    """A copy of a fixture with other tensors or another quantization_config."""
    folder = Path(shutil.copytree(FIXTURES / fixture, tmp_path / "altered"))
    tensors = load_file(folder / "model.safetensors")
    if change is not None:
        change(tensors)
        save_file(
            {n: t.clone().contiguous() for n, t in tensors.items()}, folder / "model.safetensors"
        )
    if config is not None:
        fields = json.loads((folder / "config.json").read_text())
        config(fields["quantization_config"])
        (folder / "config.json").write_text(json.dumps(fields))
    return folder


@pytest.mark.parametrize("fixture", TRUTH)
def test_old_files_become_ours_bit_for_bit(fixture: str, tmp_path: Path) -> None:
    report = export_legacy(FIXTURES / fixture, tmp_path / "ours")
    verify(tmp_path / "ours")
    export_dense(tmp_path / "ours", tmp_path / "dense")
    assert same_bits(load_file(tmp_path / "dense/model.safetensors"), truth(fixture))
    assert report["linears"] == 7
    assert [g["format"] for g in inspect(tmp_path / "ours")["groups"]] == [TRUTH[fixture][1]]


def test_both_generations_of_tensor_names_give_the_same_folder(tmp_path: Path) -> None:
    for fixture in ("bitmask", "bitmask-0.8"):
        export_legacy(FIXTURES / fixture, tmp_path / fixture)
    new, old = (load_file(tmp_path / f / "model.safetensors") for f in ("bitmask", "bitmask-0.8"))
    assert same_bits(new, old)


@pytest.mark.parametrize(
    ("fixture", "layout"), [("bitmask", "sparse-bitmask"), ("24-bitmask", "sparse-24-bitmask")]
)
def test_there_and_back_gives_the_old_file(fixture: str, layout: str, tmp_path: Path) -> None:
    export_legacy(FIXTURES / fixture, tmp_path / "ours")
    export_legacy(tmp_path / "ours", tmp_path / "theirs", to=layout)
    wrote, read = (f / "model.safetensors" for f in (tmp_path / "theirs", FIXTURES / fixture))
    assert same_bits(load_file(wrote), load_file(read))
    fields = json.loads((tmp_path / "theirs/config.json").read_text())["quantization_config"]
    original = json.loads((FIXTURES / fixture / "config.json").read_text())["quantization_config"]
    assert fields.keys() == original.keys()
    assert fields["sparsity_config"].keys() == original["sparsity_config"].keys()


@pytest.mark.parametrize(
    ("pattern", "layout"),
    [
        ("2:4", "sparse-24-bitmask"),
        ("1:4", "sparse-24-bitmask"),
        ("2:4", "sparse-bitmask"),
        ("4:8", "sparse-bitmask"),
        ("0.7", "sparse-bitmask"),
    ],
)
def test_our_floats_become_their_files(
    pattern: str, layout: str, pack_tiny: Pack, tmp_path: Path
) -> None:
    ours = pack_tiny("magnitude", pattern)
    export_legacy(ours, tmp_path / "theirs", to=layout)
    export_dense(ours, tmp_path / "dense")
    wrote = load_file(tmp_path / "theirs/model.safetensors")
    dense = load_file(tmp_path / "dense/model.safetensors")
    packed = {n.removesuffix(".compressed") for n in wrote if n.endswith(".compressed")}
    assert len(packed) == 14
    unpacked = {f"{name}.weight": old_unpack(wrote, name) for name in packed}
    rest = {n: t for n, t in wrote.items() if n.rpartition(".")[0] not in packed}
    assert same_bits(unpacked | rest, dense)
    export_legacy(tmp_path / "theirs", tmp_path / "again")
    verify(tmp_path / "again", against=tmp_path / "dense")
    if pattern in ("4:8", "0.7"):
        first, again = (load_file(f / "model.safetensors") for f in (ours, tmp_path / "again"))
        assert same_bits(first, again)


def test_a_pattern_of_another_kind_is_refused(pack_tiny: Pack, tmp_path: Path) -> None:
    with pytest.raises(PatternError, match="2:4 allows 2"):
        export_legacy(pack_tiny("magnitude", "0.5"), tmp_path / "out", to="sparse-24-bitmask")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "how", [{"values": "int4:64"}, {"head": "int8"}, {"pattern": "dense", "values": "int8:row"}]
)
def test_integer_values_are_not_rounded_into_floats(
    how: dict[str, str], pack_tiny: Pack, tmp_path: Path
) -> None:
    ours = pack_tiny(**({"method": "magnitude", "pattern": "2:4"} | how))
    with pytest.raises(InputError, match=r"int\d:.* values .* cannot be written exactly"):
        export_legacy(ours, tmp_path / "out", to="sparse-bitmask")


@pytest.mark.parametrize("fixture", ["24-int8-channel", "24-int8-group"])
def test_int8_codes_and_scales_become_ours_and_back(fixture: str, tmp_path: Path) -> None:
    export_legacy(FIXTURES / fixture, tmp_path / "ours")
    verify(tmp_path / "ours")
    kind = "int8:row" if fixture == "24-int8-channel" else "int8:32"
    assert [g["dtype"] for g in inspect(tmp_path / "ours")["groups"]] == [kind]
    export_dense(tmp_path / "ours", tmp_path / "dense")
    dense, unpacked = (
        load_file(f)
        for f in (tmp_path / "dense/model.safetensors", FIXTURES / f"{fixture}.safetensors")
    )
    assert same_bits({n: dense[n] for n in unpacked}, unpacked)
    export_legacy(tmp_path / "ours", tmp_path / "theirs", to="sparse-24-bitmask")
    wrote, read = (f / "model.safetensors" for f in (tmp_path / "theirs", FIXTURES / fixture))
    assert same_bits(load_file(wrote), load_file(read))
    export_legacy(tmp_path / "theirs", tmp_path / "again")
    again = load_file(tmp_path / "again/model.safetensors")
    assert same_bits(again, load_file(tmp_path / "ours/model.safetensors"))


def test_only_weights_are_converted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.input_scale"] = torch.ones(1)

    with caplog.at_level("WARNING"):
        export_legacy(altered(tmp_path, "24-int8-channel", change), tmp_path / "ours")
    assert "activations stay floating" in caplog.text
    assert f"{UP}.input_scale" not in load_file(tmp_path / "ours/model.safetensors")


def test_fp8_is_refused_unless_its_products_are_exact(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="fp8 codes times their scales do not fit bfloat16"):
        export_legacy(FIXTURES / "24-fp8", tmp_path / "out")
    assert not (tmp_path / "out").exists()

    def change(tensors: Tensors) -> None:
        for name in [n for n in tensors if n.endswith("weight_scale")]:
            tensors[name] = torch.full_like(tensors[name], 0.25)

    folder = altered(tmp_path, "24-fp8", change)
    export_legacy(folder, tmp_path / "ours")
    theirs = load_file(folder / "model.safetensors")
    values = load_file(tmp_path / "ours/model.safetensors")[f"{UP}.values"]
    assert values.equal(theirs[f"{UP}.compressed"].to(torch.bfloat16) / 4 + 0.0)


def test_the_source_decides_the_direction(pack_tiny: Pack, tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="name the format to write with --to"):
        export_legacy(pack_tiny(), tmp_path / "out")
    with pytest.raises(UsageError, match="leave --to out"):
        export_legacy(FIXTURES / "bitmask", tmp_path / "out", to="sparse-bitmask")
    with pytest.raises(CheckpointError, match="neither by gblm nor by compressed-tensors"):
        export_legacy(tiny, tmp_path / "out")


def test_kept_zeros_keep_their_places(tmp_path: Path) -> None:
    """Groups of the fixture with fewer than two weights: the old library chose where to keep."""
    export_legacy(FIXTURES / "24-bitmask", tmp_path / "ours")
    ours, theirs = (
        load_file(f / "model.safetensors") for f in (tmp_path / "ours", FIXTURES / "24-bitmask")
    )
    assert (theirs[f"{UP}.compressed"] == 0).any()
    assert ours[f"{UP}.bitmask"].equal(theirs[f"{UP}.bitmask"])


def test_negative_zeros_become_zeros(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors[f"{UP}.compressed"][0, 0] = -0.0

    export_legacy(altered(tmp_path, "24-bitmask", change), tmp_path / "ours")
    values = load_file(tmp_path / "ours/model.safetensors")[f"{UP}.values"]
    assert values[0, 0] == 0
    assert not values[0, 0].signbit()


def drop(part: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{UP}.{part}")


def put(part: str, value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({f"{UP}.{part}": value(tensors[f"{UP}.{part}"])})


def flip(tensor: Tensor) -> Tensor:
    """One bit of the first byte that has a set bit and a clear one."""
    return tensor ^ (torch.arange(tensor.numel()).reshape(tensor.shape) == 9).to(tensor.dtype)


DAMAGE = {
    "part missing": (drop("bitmask"), "up_proj.bitmask is missing"),
    "all parts missing": (
        lambda t: [t.pop(f"{UP}.{part}") for part in PARTS["sparse-bitmask"]],
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
    "offsets shifted": (put("row_offsets", lambda t: t + 1), "do not count the bits before row 0"),
    "offsets negative": (put("row_offsets", lambda t: -t), "do not count the bits"),
    "offsets of int32": (put("row_offsets", lambda t: t.int()), "needs"),
    "offset missing": (put("row_offsets", lambda t: t[:-1]), "needs"),
    "value missing": (put("compressed", lambda t: t[:-1]), "values for"),
    "value too many": (put("compressed", lambda t: torch.cat([t, t[:1]])), "values for"),
    "more values than places": (put("compressed", lambda t: t.repeat(9)), "needs"),
    "values of integers": (put("compressed", lambda t: t.int()), "floats are needed"),
    "stored twice": (
        lambda t: t.update({f"{UP}.weight": torch.zeros(64, 32, dtype=torch.bfloat16)}),
        "stored twice",
    ),
    "stored twice in parts": (
        lambda t: t.update(
            {f"{UP}.weight.{p}": t[f"{UP}.{p}"].clone() for p in PARTS["sparse-bitmask"]}
        ),
        "stored twice",
    ),
    "another size than the model": (
        lambda t: t.update(
            {f"{UP}.{p}": t[f"{UP.replace('up', 'down')}.{p}"] for p in PARTS["sparse-bitmask"]}
        ),
        "config.json makes it",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found(kind: str, tmp_path: Path) -> None:
    change, sentence = DAMAGE[kind]
    with pytest.raises(CheckpointError, match=sentence):
        export_legacy(altered(tmp_path, "bitmask", change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (put("bitmask", flip), "does not keep two of row"),
        (put("compressed", lambda t: t[:, :-1]), "needs"),
        (put("shape", lambda t: t[:1, 0]), "is no shape of sparse-24-bitmask"),
        (
            lambda t: t.update({f"{UP}.row_offsets": torch.zeros(64, dtype=torch.int64)}),
            "is no part of sparse-24-bitmask",
        ),
    ],
)
def test_damage_of_2_4_is_found(
    change: Callable[[Tensors], object], sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=sentence):
        export_legacy(altered(tmp_path, "24-bitmask", change), tmp_path / "out")


def settings(**changes: object) -> Callable[[dict[str, Any]], object]:
    return lambda c: c["config_groups"]["group_0"]["weights"].update(changes)


def scale(value: Callable[[Tensor], Tensor]) -> Callable[[Tensors], object]:
    return put("weight_scale", value)


CODES: dict[str, tuple[Any, Any, str]] = {
    "code -128": (
        lambda t: t[f"{UP}.compressed"].__setitem__((0, 0), -128), None, "holds the code -128",
    ),
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
    verify(tmp_path / "ours")
    ours = load_file(tmp_path / "ours/model.safetensors")
    assert ours[f"{UP}.scales"].tolist() == [[0.0078125]] * 64


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("fixture", ["marlin-int4", "marlin-int8"])
def test_marlin_is_taken_apart_into_the_codes_it_was_made_from(
    fixture: str, tmp_path: Path
) -> None:
    export_legacy(FIXTURES / fixture, tmp_path / "ours")
    verify(tmp_path / "ours")
    codes_and_scales = json.loads((FIXTURES / f"{fixture}.json").read_text())
    with PackedReader(tmp_path / "ours") as ours:
        assert ours.linears.keys() == codes_and_scales.keys()
        kinds = {linear.fmt.spec for linear in ours.linears.values()}
        for name, (codes, scales) in codes_and_scales.items():
            weight = ours.linears[name].fmt.unpack(ours.parts(name))
            assert weight.codes is not None
            assert weight.scales is not None
            assert sha256(weight.codes) == codes
            assert sha256(weight.scales.half()) == scales
    rows = f"nm/2:4/{fixture[-4:]}:row"
    assert kinds == ({rows, "nm/2:4/int4:128"} if fixture == "marlin-int4" else {rows})


def smallest_code(words: Tensor) -> Tensor:
    """The first code of all becomes -8."""
    words[0, 0] = words[0, 0] >> 4 << 4
    return words


def no_pair(meta: Tensor) -> Tensor:
    """The first group of four keeps its first place twice."""
    meta[0, 0] = meta[0, 0] >> 4 << 4
    return meta


MARLIN = {
    "code -8": (put("weight_packed", smallest_code), "holds the code -8"),
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


def test_bits_behind_the_last_column_are_damage() -> None:
    headers = {
        "bitmask": ((1, 1), torch.uint8),
        "compressed": ((1,), torch.float32),
        "row_offsets": ((1,), torch.int64),
    }
    tensor = BitmaskTensor.of("x", "sparse-bitmask", headers, [1, 5])
    parts = {"compressed": torch.ones(1), "row_offsets": torch.zeros(1, dtype=torch.int64)}
    good = tensor.mask({"bitmask": torch.tensor([[16]], dtype=torch.uint8), **parts})
    assert good.tolist() == [[False] * 4 + [True]]
    with pytest.raises(CheckpointError, match="bits behind column 4"):
        tensor.mask({"bitmask": torch.tensor([[32]], dtype=torch.uint8), **parts})


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_header_is_never_a_crash(seed: int, tmp_path: Path) -> None:
    folder = altered(tmp_path, ("bitmask", "24-int8-group", "marlin-int8")[seed % 3])
    path, draw = folder / "model.safetensors", np.random.default_rng(seed)
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    for place in draw.integers(0, 8 + length, size=2):
        data[place] = draw.integers(256)
    path.write_bytes(bytes(data[: len(data) if seed % 5 else draw.integers(len(data))]))
    try:
        with LegacyReader(folder) as reader:
            for name in reader:
                assert tuple(reader.tensor(name).shape) == reader.headers[name][0]
    except InputError:
        pass  # one sentence


@pytest.mark.parametrize(
    "name", ["os:system", "sparse_bitmask", "../x", "", None, 7, ["sparse-bitmask"], {"a": 1}]
)
def test_format_names_come_from_a_closed_list(name: object, tmp_path: Path) -> None:
    folder = altered(tmp_path, "bitmask", config=lambda c: c["sparsity_config"].update(format=name))
    with pytest.raises(
        CheckpointError, match=r"sparsity format .* is unknown; known are sparse-24"
    ):
        export_legacy(folder, tmp_path / "out")


def test_the_layouts_that_are_offered_are_those_that_are_written() -> None:
    assert set(LAYOUTS) == set(PARTS)
    assert set(PARTS) < set(LEGACY_FORMATS)


def test_a_model_without_zeros_needs_no_packing(tiny: Path, tmp_path: Path) -> None:
    folder = altered(
        tmp_path, "dense", lambda t: t.update({n: torch.ones_like(x) for n, x in t.items()})
    )
    with pytest.raises(InputError, match="use it as a dense model"):
        export_legacy(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "fixture"),
    [("inspect", "dense"), ("verify", "24-bitmask"), ("prune", "bitmask-0.8")],
)
def test_other_commands_name_the_way_out(
    command: str, fixture: str, gblm: Callable[..., Outcome]
) -> None:
    words = ["--output", "out"] if command == "prune" else []
    done = gblm(command, FIXTURES / fixture, *words)
    assert done.code == 4, done
    assert f"`gblm export legacy {FIXTURES / fixture} --output OUT`" in done.err


@pytest.mark.parametrize("fixture", [*TRUTH, "24-fp8", "marlin-int8"])
def test_serve_names_the_way_out(fixture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "vllm" or None)
    with pytest.raises(InputError, match=r"`gblm export legacy .* --output OUT`"):
        check(Server(FIXTURES / fixture))


def test_the_command_converts_and_converts_back(
    gblm: Callable[..., Outcome], tmp_path: Path
) -> None:
    done = gblm("export", "legacy", FIXTURES / "24-bitmask", "--output", tmp_path / "ours")
    assert done.code == 0, done
    assert "7 linears converted to gblm" in done.out
    done = gblm(
        "export", "legacy", tmp_path / "ours", "--output", tmp_path / "theirs",
        "--to", "sparse-24-bitmask", "--json",
    )  # fmt: skip
    assert done.code == 0, done
    assert json.loads(done.out)["layout"] == "sparse-24-bitmask"
    assert (tmp_path / "theirs/model.safetensors").exists()
