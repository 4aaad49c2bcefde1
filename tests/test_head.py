"""The output head as codes: packed beside the pruned linears, untied, loaded, exported, refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from alike import assert_same_tensors, logits
from conftest import Pack, Run, content, save_tiny_model
from damage import Damage, config, damaged, tensors
from test_families import save_family

import gblm.packed
from gblm.calibrate.text import draw
from gblm.checkpoint.inspect import inspect, verify
from gblm.errors import CheckpointError, PatternError
from gblm.export.dense import export_dense
from gblm.export.pack import export_pack
from gblm.model.folder import ModelFolder
from gblm.model.loading import load, load_tokenizer
from gblm.model.packed_reader import PackedReader
from gblm.model.reader import Reader
from gblm.prune import prune
from gblm.recipe import Calibration, Recipe
from gblm.sparse import passes
from gblm.sparse.values import parse_values, quantize

EMBEDDINGS = "model.embed_tokens.weight"


def tied_as(tied: object) -> Damage:
    return config(lambda found: found["quantization_config"].update(tied=tied))


def magnitude(model: Path, **fields: object) -> Recipe:
    return Recipe(model=str(model), method="magnitude", calibration=None, **fields)


@pytest.mark.parametrize(("values", "tied"), [("int8", True), ("int8", False), ("int4", True)])
def test_head_is_the_rounded_source_and_the_embeddings_that_are_tied_to_it(
    pack_tiny: Pack, tiny: Path, tiny_untied: Path, values: str, tied: bool
) -> None:
    source = tiny if tied else tiny_untied
    with (
        PackedReader(ModelFolder.open(pack_tiny(head=values, tied=tied))) as packed,
        Reader(ModelFolder.open(source)) as dense,
    ):
        linear = packed.linears["lm_head"]
        spec = f"{values}:{64 if values == 'int8' else 32}"
        assert linear.fmt.spec == f"dense/dense/{spec}"
        weight = dense.tensor(EMBEDDINGS if tied else "lm_head.weight")
        every = torch.ones_like(weight, dtype=torch.bool)
        want = quantize(weight, every, parse_values(spec))
        found = linear.fmt.unpack(packed.parts("lm_head"))
        assert torch.equal(found.codes, want.codes)
        assert torch.equal(found.scales, want.scales)
        assert "lm_head.weight" not in packed
        assert packed.folder.config["tie_word_embeddings"] is False
        manifest = packed.manifest.to_config()
        assert manifest["groups"][-1] == {
            "format": "dense", "pattern": "dense", "values": spec, "targets": ["lm_head"]
        }  # fmt: skip
        if tied:
            assert EMBEDDINGS not in packed
            assert manifest["tied"] == {"model.embed_tokens": "lm_head"}
            loaded = gblm.packed.load(packed.folder, "reference")
            assert torch.equal(loaded.get_input_embeddings().weight, found.weight.bfloat16())
        else:
            assert torch.equal(packed.tensor(EMBEDDINGS), dense.tensor(EMBEDDINGS))
            assert "tied" not in manifest


@pytest.mark.parametrize("pattern", ["2:4", "dense"])
def test_head_is_reported_apart_from_the_pruned_linears(pack_tiny: Pack, pattern: str) -> None:
    folder, without = (pack_tiny("wanda", pattern, "int8:64", head) for head in ("int8", "float"))
    report, plain = (
        json.loads((f / "sparsity_report.json").read_text()) for f in (folder, without)
    )
    head = report.pop("head")
    assert (head["name"], head["embeddings"], head["bits_per_weight"]) == ("lm_head", True, 8.25)
    saved = head["bytes_dense"] - head["bytes_packed"]
    assert saved == 258 * 64 * (16 - 8.25) / 8
    assert plain.pop("bytes_packed") - report.pop("bytes_packed") == saved
    assert report == plain
    facts, before = inspect(ModelFolder.open(folder)), inspect(ModelFolder.open(without))
    assert facts["groups"] == before["groups"]
    assert (facts["head"]["bits_per_weight"], facts["head"]["weights"]) == (8.25, 258 * 64)
    assert before["bytes"] - facts["bytes"] == saved
    assert before["bytes_if_dense"] == facts["bytes_if_dense"]


def test_a_head_that_stays_floating_is_not_mentioned(pack_tiny: Pack, tiny: Path) -> None:
    folder = pack_tiny()
    assert "lm_head" not in (folder / "config.json").read_text()
    assert '"head"' not in (folder / "sparsity_report.json").read_text()
    assert "head" not in inspect(ModelFolder.open(folder))
    tied = [json.loads((f / "config.json").read_text())["tie_word_embeddings"]
            for f in (folder, tiny)]  # fmt: skip
    assert tied == [True, True]


def test_rounding_some_rows_at_a_time_changes_nothing(
    tiny: Path, pack_tiny: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = pack_tiny("magnitude", head="int4")
    monkeypatch.setattr(passes, "BLOCK", 64 * 50)
    prune(magnitude(tiny, head="int4"), tmp_path / "out")
    assert content(tmp_path / "out")["model.safetensors"] == content(want)["model.safetensors"]


@pytest.mark.parametrize("values", ["int8", "float"])
def test_4_bits_are_rounded_so_that_errors_make_up_for_each_other(
    tiny: Path, text_file: Path, tmp_path: Path, values: str
) -> None:
    calibration = Calibration(source=str(text_file), num_samples=8, seq_len=64)
    how = {"pattern": "2:4", "values": values, "head": "int4", "calibration": calibration}
    tokenizer, dense = load_tokenizer(tiny), load(tiny)
    ids = draw(calibration, tiny, tokenizer)
    errors = []
    for rounding in ("nearest", "obs"):
        folder = tmp_path / rounding
        prune(Recipe(model=str(tiny), method="magnitude", rounding=rounding, **how), folder)
        model = gblm.packed.load(folder, "reference")
        with torch.no_grad():
            states = model.model(input_ids=ids).last_hidden_state.float()
        head = model.get_input_embeddings().weight.float()
        errors.append((states @ (head - dense.get_output_embeddings().weight.float()).T).norm())
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("tied", [True, False])
def test_packing_a_dense_folder_makes_the_same_head(
    tiny: Path, tiny_untied: Path, pack_tiny: Pack, tmp_path: Path, tied: bool
) -> None:
    source = tiny if tied else tiny_untied
    report = export_pack(source, tmp_path / "out", pattern="dense", values="int8", head="int8")
    verify(ModelFolder.open(tmp_path / "out"))
    assert report["head"]["embeddings"] is tied
    assert json.loads((tmp_path / "out/recipe.json").read_text())["head"] == "int8"
    assert_same_tensors(pack_tiny("magnitude", "dense", "int8", "int8", tied), tmp_path / "out")


@pytest.mark.parametrize("family", ["gemma2", "gemma3 text", "qwen3", "phi3 (fused)"])
def test_embeddings_are_scaled_as_before(family: str, tmp_path: Path) -> None:
    source = save_family(family, tmp_path / "model")
    prune(magnitude(source, head="int8"), tmp_path / "out")
    export_dense(ModelFolder.open(tmp_path / "out"), tmp_path / "dense")
    got = logits(gblm.packed.load(tmp_path / "out", "reference"))
    assert torch.equal(got, logits(load(tmp_path / "dense")))
    prune(magnitude(source), tmp_path / "plain")
    plain = logits(gblm.packed.load(tmp_path / "plain", "reference"))
    assert (got - plain).norm() < 0.02 * plain.norm()


@pytest.mark.parametrize(
    ("part", "value", "match"),
    [("scales", 0.0, r"lm_head\.scales: row 257, group 0 is 0\.0"),
     ("values", None, r"lm_head: .* does not describe the stored weight")],
)  # fmt: skip
def test_damaged_head_does_not_pass(
    pack_tiny: Pack, tmp_path: Path, part: str, value: float | None, match: str
) -> None:
    def change(found: dict[str, torch.Tensor]) -> None:
        row = found[f"lm_head.{part}"][257]
        row[0] = int(row[0] == 0) if value is None else value

    folder = damaged(pack_tiny(head="int8"), tmp_path / "out", tensors(change))
    with pytest.raises(CheckpointError, match=match):
        verify(ModelFolder.open(folder))
    if value is not None:
        with pytest.raises(CheckpointError, match=match):
            gblm.packed.load(folder)


def test_missing_head_is_found(pack_tiny: Pack, tmp_path: Path) -> None:
    gone = tensors(lambda found: [found.pop(f"lm_head.{part}") for part in ("values", "scales")])
    folder = damaged(pack_tiny(head="int8", tied=False), tmp_path / "out", gone)
    with pytest.raises(CheckpointError, match="lm_head: reported, but not stored"):
        verify(ModelFolder.open(folder))
    with pytest.raises(CheckpointError, match="the packed weight of lm_head is missing"):
        gblm.packed.load(folder)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (tensors(lambda found: [found.pop(f"lm_head.{part}") for part in ("values", "scales")]),
         r"embed_tokens\.weight is the packed lm_head, says the manifest, but that is missing"),
        (tensors(lambda found: found.update({EMBEDDINGS: torch.zeros(258, 64)})),
         r"embed_tokens\.weight is the packed lm_head, .* but it is stored as well"),
        (tied_as({"model.embed_tokens": "x"}), "the second must be packed, and no other"),
        (tied_as({"lm_head": "lm_head"}), "the second must be packed, and no other"),
        (tied_as({"model.embed_tokens": "model.layers.0.mlp.up_proj"}), "in dense codes"),
        (tied_as({"model.norm2": "lm_head"}), r"tensor model\.embed_tokens\.weight is missing"),
        (tied_as({}), r"tensor model\.embed_tokens\.weight is missing"),
        (tied_as(["lm_head"]), "manifest: tied: Input should be a valid dictionary"),
    ],
)  # fmt: skip
def test_embeddings_that_are_not_the_head_are_refused(
    pack_tiny: Pack, tmp_path: Path, change: Damage, match: str
) -> None:
    folder = damaged(pack_tiny(head="int8"), tmp_path / "out", change)
    with pytest.raises(CheckpointError, match=match):
        gblm.packed.load(folder)


def test_packed_head_cannot_be_tied(pack_tiny: Pack, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tied = config(lambda found: found.update(tie_word_embeddings=True))
    folder = damaged(pack_tiny(head="int8"), tmp_path / "out", tied)
    with pytest.raises(CheckpointError, match=r"lm_head: packed, but config\.json ties it"):
        gblm.packed.load(folder)
    with pytest.raises(CheckpointError, match=r"lm_head: packed, but config\.json ties it"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_what_cannot_be_rounded_is_refused_before_anything_runs(
    tmp_path: Path, tiny_untied: Path
) -> None:
    odd = save_tiny_model(tmp_path / "odd", hidden_size=40)
    with pytest.raises(PatternError, match=r"lm_head: 40 columns .*--head float"):
        prune(magnitude(odd, head="int8"), tmp_path / "out")
    nan = tensors(lambda found: found["lm_head.weight"][3, 3:4].fill_(torch.nan))
    folder = damaged(tiny_untied, tmp_path / "nan", nan)

    def no_step(*args: object) -> Callable[[], None]:
        raise AssertionError

    with pytest.raises(CheckpointError, match=r"lm_head\.weight holds NaN"):
        prune(magnitude(folder, head="int8"), tmp_path / "out", no_step)


def test_head_on_the_command_line(gblm: Run, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ("--method", "magnitude", "--values", "int8:32", "--head", "int8", "--output", out)
    done = gblm("prune", tiny, *words)
    assert done.code == 0, done
    assert "magnitude 2:4 int8:32" in done.out
    assert "output head and embeddings int8:64, 8.25 bits per weight" in done.out
    recipe = json.loads((out / "recipe.json").read_text())
    assert (recipe["values"], recipe["head"]) == ("int8:32", "int8")
    rows = [line.split() for line in gblm("inspect", out).out.splitlines()]
    assert ["dense", "dense", "int8:64", "lm_head", "16,512", "0.0%", "8.25"] in rows
    assert gblm("inspect", out, "--verify").code == 0
    packed = tmp_path / "packed"
    words = ("--pattern", "dense", "--values", "int4:64", "--head", "int4", "--output", packed)
    done = gblm("export", "pack", tiny, *words)
    assert done.code == 0, done
    assert "int4:64" in gblm("inspect", packed).out
    assert "output head and embeddings int4:32" in done.out
    done = gblm("prune", tiny, "--head", "fp8", "--output", tmp_path / "no")
    assert done.code == 2
