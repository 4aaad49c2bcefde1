"""`gblm export pack` on files that compressed-tensors wrote: bit for bit, or rounded once."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from conftest import Pack, Run
from legacy_cases import FIXTURES, UP, Change, Tensors, altered, each_scale, put, settings
from safetensors.torch import load_file
from torch import Tensor

from gblm.checkpoint.inspect import inspect, verify
from gblm.errors import CheckpointError, InputError
from gblm.export.dense import export_dense
from gblm.export.legacy import export_legacy
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
from gblm.sparse.weights import same_bits

# Fixture → the weights before the old library packed them, and how we store them.
FLOATS = {
    "bitmask": ("unstructured", "bitmask", "bfloat16"),
    "bitmask-0.8": ("unstructured", "bitmask", "bfloat16"),
    "24-bitmask": ("2of4", "nm", "bfloat16"),
    "dense": ("2of4", "nm", "bfloat16"),
}
# Fixture → what the old library unpacks its codes to, and how we store them.
CODES = {
    "24-int8-channel": ("24-int8-channel", "nm", "int8:row"),
    "24-int8-group": ("24-int8-group", "nm", "int8:32"),
}


def tensors_of(folder: Path) -> Tensors:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("fixture", FLOATS | CODES)
def test_old_files_become_ours_and_dense_ones_bit_for_bit(fixture: str, tmp_path: Path) -> None:
    truth, fmt, dtype = (FLOATS | CODES)[fixture]
    report = export_legacy(FIXTURES / fixture, tmp_path / "ours")
    ours = ModelFolder.open(tmp_path / "ours")
    verify(ours)
    export_dense(ours, tmp_path / "dense")
    dense, want = tensors_of(tmp_path / "dense"), load_file(FIXTURES / f"{truth}.safetensors")
    assert want.keys() == dense.keys() if fixture in FLOATS else want.keys() <= dense.keys()
    assert all(same_bits(dense[name], tensor) for name, tensor in want.items())
    assert report["linears"] == 7
    assert [(g["format"], g["dtype"]) for g in inspect(ours)["groups"]] == [(fmt, dtype)]


def test_kept_zeros_keep_their_places(tmp_path: Path) -> None:
    """Groups of the fixture with fewer than two weights: the old library chose where to keep."""
    export_legacy(FIXTURES / "24-bitmask", tmp_path / "ours")
    ours, theirs = tensors_of(tmp_path / "ours"), tensors_of(FIXTURES / "24-bitmask")
    assert (theirs[f"{UP}.compressed"] == 0).any()
    assert ours[f"{UP}.bitmask"].equal(theirs[f"{UP}.bitmask"])


def first(value: float) -> Change:
    """Another first value, or code, of UP."""

    def change(tensor: Tensor) -> Tensor:
        tensor[0, 0] = value
        return tensor

    return put("compressed", change)


def test_negative_zeros_become_zeros_and_the_least_code_stays_itself(tmp_path: Path) -> None:
    for fixture, given, want in (("24-bitmask", -0.0, 0.0), ("24-int8-channel", -128, -128)):
        folder = altered(tmp_path / fixture, fixture, first(given))
        export_legacy(folder, tmp_path / fixture / "ours")
        verify(ModelFolder.open(tmp_path / fixture / "ours"))
        found = tensors_of(tmp_path / fixture / "ours")[f"{UP}.values"][0, 0]
        assert found == want
        assert bool(found.signbit()) is (want < 0)


def test_only_weights_are_converted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    name = f"{UP}.input_scale"
    folder = altered(tmp_path, "24-int8-channel", lambda t: t.update({name: torch.ones(1)}))
    with caplog.at_level("WARNING"):
        export_legacy(folder, tmp_path / "ours")
    assert "activations stay floating" in caplog.text
    assert name not in tensors_of(tmp_path / "ours")


def test_one_scale_for_a_whole_tensor_is_that_of_every_row(tmp_path: Path) -> None:
    single = each_scale(lambda t: torch.full((1,), 0.0078125, dtype=t.dtype))
    folder = altered(tmp_path, "24-int8-channel", single, settings(strategy="tensor"))
    export_legacy(folder, tmp_path / "ours")
    verify(ModelFolder.open(tmp_path / "ours"))
    assert tensors_of(tmp_path / "ours")[f"{UP}.scales"].tolist() == [[0.0078125]] * 64


# Scales of fp8 → how far its products may be off: powers of two round nothing.
FP8: dict[str, tuple[Change, bool, float]] = {
    "channel": (each_scale(lambda t: torch.full_like(t, 0.0078125)), False, 0),
    "tensor": (each_scale(lambda t: torch.full((1,), 0.0078125, dtype=t.dtype)), True, 0),
    **{
        f"fine {dtype}": (each_scale(lambda t, d=dtype: (t.float() * 1.003).to(d)), False, 2.0**-8)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    },
}


@pytest.mark.parametrize("kind", FP8)
def test_fp8_becomes_the_floats_that_it_stands_for_rounded_once(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change, single, error = FP8[kind]
    folder = altered(tmp_path, "24-fp8", change, settings(strategy="tensor") if single else None)
    report = export_legacy(folder, tmp_path / "ours")
    assert report["rounded"] == "bfloat16"
    assert "rounded once to bfloat16 (relative error at most 2^-8" in caplog.text
    recipe = json.loads((tmp_path / "ours/recipe.json").read_text())
    assert recipe["options"] == {"legacy": "sparse-24-bitmask", "rounded": "bfloat16"}
    verify(ModelFolder.open(tmp_path / "ours"))
    theirs, ours = tensors_of(folder), tensors_of(tmp_path / "ours")
    for name in [n.removesuffix(".compressed") for n in theirs if n.endswith(".compressed")]:
        exact = theirs[f"{name}.compressed"].double() * theirs[f"{name}.weight_scale"].double()
        values = ours[f"{name}.values"]
        assert values.dtype == torch.bfloat16
        assert bool(((values.double() - exact).abs() <= error * exact.abs()).all())
        assert ours[f"{name}.bitmask"].equal(theirs[f"{name}.bitmask"])


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


# Fixture of marlin-24, which the old library wrote but could not read → rows with the least code,
# which has no opposite: scales of the old library itself give it, and all of them are kept.
MARLIN = {"marlin-int4": None, "marlin-int8": None, "marlin-int4-own": 113, "marlin-int8-own": 31}


@pytest.mark.parametrize("fixture", MARLIN)
def test_marlin_is_taken_apart_into_the_codes_it_was_made_from(
    fixture: str, tmp_path: Path
) -> None:
    export_legacy(FIXTURES / fixture, tmp_path / "ours")
    verify(ModelFolder.open(tmp_path / "ours"))
    codes_and_scales = json.loads((FIXTURES / f"{fixture}.json").read_text())
    least = 0
    with PackedReader(ModelFolder.open(tmp_path / "ours")) as ours:
        assert ours.linears.keys() == codes_and_scales.keys()
        kinds = {linear.fmt.spec for linear in ours.linears.values()}
        for name, (codes, scales) in codes_and_scales.items():
            fmt = ours.linears[name].fmt
            weight = fmt.unpack(ours.parts(name))
            assert weight.codes is not None
            assert weight.scales is not None
            assert sha256(weight.codes) == codes
            assert sha256(weight.scales.half()) == scales
            least += int((weight.codes == fmt.values.least).any(dim=1).sum())
    rows = f"nm/2:4/{fixture[7:11]}:row"
    assert kinds == ({rows, "nm/2:4/int4:128"} if fixture == "marlin-int4" else {rows})
    assert MARLIN[fixture] in (None, least)


def test_other_folders_are_refused(pack_tiny: Pack, tiny: Path, tmp_path: Path) -> None:
    for folder in (pack_tiny(), tiny):
        with pytest.raises(CheckpointError, match="no sparse format of compressed-tensors"):
            export_legacy(folder, tmp_path / "out")
    ones = altered(
        tmp_path, "dense", lambda t: t.update({n: torch.ones_like(x) for n, x in t.items()})
    )
    with pytest.raises(InputError, match="use it as a dense model"):
        export_legacy(ones, tmp_path / "out")


@pytest.mark.parametrize(
    ("command", "fixture"),
    [("inspect", "dense"), ("prune", "bitmask-0.8")],
)
def test_other_commands_name_the_way_out(command: str, fixture: str, gblm: Run) -> None:
    words = ["--output", "out"] if command == "prune" else []
    done = gblm(*command.split(), FIXTURES / fixture, *words)
    assert done.code == 4, done
    assert f"`gblm export pack {FIXTURES / fixture} --output OUT`" in done.err


def test_the_command_converts_and_says_that_it_rounds(gblm: Run, tmp_path: Path) -> None:
    words = ("export", "pack", FIXTURES / "24-fp8", "--output", tmp_path / "ours")
    done = gblm(*words, "--values", "int8")
    assert (done.code, "--values: SOURCE is stored sparse already" in done.err) == (2, True)
    done = gblm(*words)
    assert done.code == 0, done
    assert "7 linears packed" in done.out
    assert "fp8 codes × scales rounded once to bfloat16" in done.out
