"""From recipe to packed folder, and everything that can go wrong on the way."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Pack, Run, save_tiny_model
from damage import damaged, tensors
from resident import Resident
from safetensors.torch import load_file
from weights import stored

from gblm.calibrate.walk import Walk, walk
from gblm.checkpoint import write
from gblm.checkpoint.inspect import verify
from gblm.errors import CheckpointError, InputError, MachineError, PatternError, UsageError
from gblm.export.dense import export_dense
from gblm.export.pack import export_pack
from gblm.methods import make_method
from gblm.methods.pipeline import Pipeline
from gblm.model.folder import ModelFolder
from gblm.model.linears import prunable
from gblm.model.loading import load, load_tokenizer
from gblm.prune import Output, prune
from gblm.prune.job import Job
from gblm.prune.layer import prune_layer
from gblm.recipe import Calibration, Recipe, Recovering
from gblm.sparse.formats import format_for
from gblm.sparse.patterns import NM
from gblm.sparse.values import parse_values, quantize
from gblm.sparse.weights import SparseWeight


@pytest.fixture
def recipe(tiny: Path, text_file: Path) -> Recipe:
    calibration = Calibration(source=str(text_file), num_samples=2, seq_len=16)
    return Recipe(model=str(tiny), method="wanda", calibration=calibration)


@pytest.mark.usefixtures("without_bfloat16")
def test_where_bfloat16_is_emulated_pruning_computes_in_float32(
    recipe: Recipe, tmp_path: Path
) -> None:
    for dtype in ("auto", "float32"):
        prune(recipe.model_copy(update={"dtype": dtype, "method": "sparsegpt"}), tmp_path / dtype)
    found, wanted = (load_file(tmp_path / d / "model.safetensors") for d in ("auto", "float32"))
    assert all(torch.equal(tensor, found[name]) for name, tensor in wanted.items())
    assert torch.bfloat16 in {tensor.dtype for tensor in found.values()}
    assert torch.float32 not in {tensor.dtype for tensor in found.values()}


@pytest.mark.parametrize(
    ("method", "pattern", "values"),
    [("magnitude", "2:4", "float"), ("magnitude", "0.5", "float"), ("wanda", "4:8", "float"),
     ("wanda", "0.7", "float"), ("gblm", "8:16", "float"), ("gblm", "1:4", "float"),
     ("gblm", "0.5", "float"), ("magnitude", "2:4", "int8"), ("magnitude", "0.5", "int4:32")],
)  # fmt: skip
def test_packed_weights_are_the_source_weights_where_kept(
    tiny: Path, pack_tiny: Pack, method: str, pattern: str, values: str
) -> None:
    folder = pack_tiny(method, pattern, values)
    source, linears = load_file(tiny / "model.safetensors"), stored(folder)
    assert len(linears) == 14
    for name, (fmt, found) in linears.items():
        dense = source.pop(f"{name}.weight")
        assert found.weight.dtype == dense.dtype == torch.bfloat16
        want = SparseWeight.cut(dense, found.mask)
        if values != "float":
            want = quantize(dense, found.mask, fmt.values)
        for one, other in ((found.codes, want.codes), (found.scales, want.scales)):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
        assert torch.equal(found.weight, want.weight)
        fmt.pattern.check_mask(name, found.mask)
    kept = load_file(folder / "model.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in source.items())


@pytest.mark.parametrize("values", ["float", "int4:32"])
def test_later_layers_see_the_weights_as_they_are_stored(tiny: Path, values: str) -> None:
    layers = Resident(load(tiny))
    linears = prunable(layers.model)
    formats = dict.fromkeys(linears, format_for(NM(2, 4), parse_values(values)))
    recipe = Recipe(model=str(tiny), calibration=None)
    job = Job(recipe, layers, formats, Pipeline(make_method("magnitude", {})))
    done = 0
    for layer in walk(layers, [], Walk(frozenset())):
        for name, weight in prune_layer(job, layer).weights.items():
            assert (weight.codes is None) == (values == "float")
            assert torch.equal(linears[name].weight, weight.weight)
            assert float(weight.mask.float().mean()) == 0.5
            done += 1
    assert done == 14


def test_models_are_split_into_shards_as_asked(recipe: Recipe, tmp_path: Path) -> None:
    prune(recipe.model_copy(update={"max_shard_size": "20KB"}), tmp_path / "pruned")
    export_dense(ModelFolder.open(tmp_path / "pruned"), tmp_path / "dense", max_shard_size="0.5kb")
    export_pack(tmp_path / "dense", tmp_path / "packed", max_shard_size="20 KB")
    for name, least, limit in (("pruned", 6, 20_000), ("dense", 10, 500), ("packed", 6, 20_000)):
        shards = list((tmp_path / name).glob("model-*-of-*.safetensors"))
        assert len(shards) >= least, name
        for shard in shards:
            sizes = [tensor.nbytes for tensor in load_file(shard).values()]
            assert sum(sizes) <= limit or len(sizes) == 1, shard
    assert verify(ModelFolder.open(tmp_path / "pruned"))["ok"]
    verify(ModelFolder.open(tmp_path / "packed"), ModelFolder.open(tmp_path / "dense"))


@pytest.mark.parametrize("size", ["5", "0GB", "-1GB", "5 apples", "nanGB", "9999999TB"])
def test_a_size_of_shards_has_a_unit(size: str) -> None:
    with pytest.raises(UsageError, match="give a number and KB, MB, GB or TB"):
        Recipe(model="m", max_shard_size=size)


def test_existing_output_is_kept_unless_overwritten(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("precious")
    with pytest.raises(InputError, match="exists; choose another name or pass --overwrite"):
        prune(recipe, tmp_path / "out")
    with pytest.raises(InputError, match="is no model folder and is not replaced"):
        prune(recipe, Output(tmp_path / "out", overwrite=True))
    assert (tmp_path / "out/mine").read_text() == "precious"
    (tmp_path / "out/config.json").write_text("{}")
    prune(recipe, Output(tmp_path / "out", overwrite=True))
    assert not (tmp_path / "out/mine").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwriting_the_source_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    source = Path(shutil.copytree(recipe.model, tmp_path / "models/m"))
    inner = recipe.model_copy(update={"model": str(source)})
    for output in (source, source.parent):
        with pytest.raises(InputError, match="cannot be replaced: it holds"):
            prune(inner, Output(output, overwrite=True))
    assert (source / "model.safetensors").exists()


def test_output_that_appears_during_the_run_is_not_replaced(recipe: Recipe, tmp_path: Path) -> None:
    def appear(phase: str, steps: int) -> Callable[[], None]:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out/config.json").write_text("other")
        return lambda: None

    with pytest.raises(InputError, match="exists"):
        prune(recipe, tmp_path / "out", progress=appear)
    assert (tmp_path / "out/config.json").read_text() == "other"
    # The work is not lost either.
    prune(recipe, Output(tmp_path / "out", overwrite=True), progress=lambda *phase: pytest.fail)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_values_do_not_depend_on_the_computations_dtype(
    recipe: Recipe, tmp_path: Path, dtype: str
) -> None:
    source = save_tiny_model(tmp_path / "m", dtype="float32")
    update = {"model": str(source), "dtype": dtype, "method": "magnitude"}
    prune(recipe.model_copy(update=update), tmp_path / "out")
    dense = load_file(source / "model.safetensors")
    for name, (_, found) in stored(tmp_path / "out").items():
        assert found.weight.dtype == torch.float32
        assert torch.equal(found.weight[found.mask], dense[f"{name}.weight"][found.mask])


def test_indivisible_columns_are_refused_before_calibration(recipe: Recipe, tmp_path: Path) -> None:
    odd = recipe.model_copy(
        update={"pattern": "2:5", "calibration": Calibration(source="missing.txt")}
    )
    with pytest.raises(PatternError, match=r"model\.layers\.0\.self_attn\.q_proj: 64 columns"):
        prune(odd, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "value"),
    [("magnitude", float("nan")), ("wanda", float("inf")), ("sparsegpt", float("inf")),
     ("gblm", float("nan"))],
)  # fmt: skip
def test_damaged_weights_are_named(
    recipe: Recipe, tmp_path: Path, method: str, value: float
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    damage = tensors(lambda found: found[name][0, :1].fill_(value))
    bad = damaged(Path(recipe.model), tmp_path / "bad", damage)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN"):
        prune(recipe.model_copy(update={"model": str(bad), "method": method}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dtype_that_packed_folders_do_not_hold_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    def widen(found: dict[str, torch.Tensor]) -> None:
        found["model.norm.weight"] = found["model.norm.weight"].double()

    odd = damaged(Path(recipe.model), tmp_path / "odd", tensors(widen))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is torch\.float64"):
        prune(recipe.model_copy(update={"model": str(odd)}), tmp_path / "out")


def test_a_tokenizer_of_another_model_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(recipe.model, tmp_path / "odd"))
    config = json.loads((odd / "config.json").read_text()) | {"vocab_size": 9}
    (odd / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"knows \d+ tokens, the model 9: it is another model's"):
        load_tokenizer(odd)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "gblm"])
def test_activations_that_overflow_are_named(recipe: Recipe, tmp_path: Path, method: str) -> None:
    names = [f"model.layers.0.mlp.{name}.weight" for name in ("up_proj", "gate_proj")]
    damage = tensors(lambda found: [found[name].fill_(3000) for name in names])
    bad = damaged(Path(recipe.model), tmp_path / "bad", damage)
    recipe = recipe.model_copy(update={"model": str(bad), "method": method, "dtype": "float16"})
    with pytest.raises(InputError, match=r"0\.mlp\.down_proj: the \w+ of"):
        prune(recipe, tmp_path / "out")


def test_too_little_disk_space_is_found_before_any_work(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write.shutil, "disk_usage", lambda path: type("U", (), {"free": 10})())
    with pytest.raises(MachineError, match="GB free"):
        prune(recipe, tmp_path / "out")


def prune_on_a_full_disk(arguments: list[object], file_bytes: int) -> str:
    """RLIMIT_FSIZE makes the kernel refuse the write of a file, as a full disk does."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    done = subprocess.run(
        [sys.executable, "-m", "gblm", *map(str, arguments)],
        capture_output=True, text=True, preexec_fn=limit, check=False,
    )  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "writing" in done.stderr
    assert "failed" in done.stderr
    return done.stderr


@pytest.mark.slow
def test_a_disk_that_is_full_at_once_leaves_nothing(tmp_path: Path, tiny: Path) -> None:
    prune_on_a_full_disk(["prune", tiny, "--method", "magnitude", "--output", tmp_path / "out"],
                         10_000)  # fmt: skip
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_leaves_finished_layers_only(
    tmp_path: Path, tiny: Path, gblm: Run
) -> None:
    arguments = ["prune", tiny, "--method", "magnitude", "--output", tmp_path / "out"]
    assert "2 finished decoder layers are kept" in prune_on_a_full_disk(arguments, 60_000)
    assert [p.name for p in tmp_path.iterdir()] == [".out.work"]
    assert gblm(*arguments).code == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("signal_number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_a_stopped_run_leaves_no_folder_under_the_final_name(
    tiny: Path, tmp_path: Path, signal_number: signal.Signals, code: int
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "gblm", "prune", str(tiny), "--method", "gblm",
         "--num-samples", "100000", "--seq-len", "64", "--output", str(tmp_path / "out")],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    limit = time.monotonic() + 120
    while not (tmp_path / ".out.work/run.json").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(signal_number)
    # Slow machines: Python looks for signals between two calls only.
    _, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in err


def test_read_only_parent_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        parent = Path("/proc/gblm")
    else:
        parent = tmp_path / "locked"
        parent.mkdir(mode=0o500)
    with pytest.raises(MachineError, match=r"not writable|0\.00 GB free"):
        prune(recipe, parent / "out")


def test_packed_model_is_not_pruned_again(recipe: Recipe, pack_tiny: Pack, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="packed already"):
        prune(recipe.model_copy(update={"model": str(pack_tiny())}), tmp_path / "out")


def test_unknown_recipe_keys_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="recipe: sparsty"):
        Recipe.from_dict({"model": "m", "sparsty": 0.5})
    with pytest.raises(UsageError, match=r"recipe: calibration\.prefix"):
        Recipe.from_dict({"model": "m", "calibration": {"prefix": "pruned"}})
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(InputError, match="one JSON object"):
        Recipe.from_file(tmp_path / "r.json")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_are_none_are_refused(value: float) -> None:
    for fields in ({"learning_rate": value}, {"minutes": value}):
        with pytest.raises(UsageError, match=f"recovering: {next(iter(fields))}: Input should be"):
            Recovering.from_dict(fields)
    with pytest.raises(UsageError, match=r"recipe: calibration\.shrinkage: Input should be"):
        Recipe.from_dict({"model": "m", "calibration": {"shrinkage": value}})


def test_updated_weights_are_stored_in_the_checkpoints_dtype(
    recipe: Recipe, tmp_path: Path
) -> None:
    prune(recipe.model_copy(update={"method": "sparsegpt", "dtype": "float32"}), tmp_path / "out")
    assert {one.weight.dtype for _, one in stored(tmp_path / "out").values()} == {torch.bfloat16}
