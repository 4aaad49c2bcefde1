"""What a made folder gives to others: whole, readable, and without a word of this machine."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from conftest import Run, content
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from gblm.checkpoint.write import new_folder
from gblm.evaluate.run import known_baseline
from gblm.export.dense import export_dense
from gblm.export.pack import export_pack
from gblm.model.folder import ModelFolder
from gblm.prune import prune
from gblm.recipe import Calibration, Recipe, Recovering
from gblm.recover.run import recover

# Files that go along unchanged, by name; those of a chat model.
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
SIDE = {
    "chat_template.jinja": TEMPLATE,
    "generation_config.json": json.dumps({"temperature": 0.25, "do_sample": True, "top_k": 7}),
    "preprocessor_config.json": json.dumps({"image_mean": [0.5]}),
    "additional_chat_templates/tool_use.jinja": "{{ tools | length }} tools",
    "LICENSE": "Do as you like.",
}
CARD = "---\nlicense: llama3.2\nlicense_link: https://x.org/a?b=c#d\ntags: [old]\n---\n# Llama\n"


@pytest.fixture
def chat_model(tiny: Path, tmp_path: Path) -> Path:
    """The tiny model with a name that YAML would misread, and with what chat models have."""
    folder = Path(shutil.copytree(tiny, tmp_path / "models" / "a: b #1"))
    for name, text in SIDE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def recipe(chat_model: Path, text_file: Path, tmp_path: Path) -> Recipe:
    text = shutil.copy(text_file, tmp_path / "text.txt")
    calibration = Calibration(source=f"{text}:1,pydoc:1", num_samples=4, seq_len=32)
    return Recipe(model=str(chat_model), method="wanda", values="int4", calibration=calibration)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GBLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def recovering(text: Path) -> Recovering:
    return Recovering(text=str(text), held_out=(str(text),), tokens=256, seq_len=32)


def test_no_file_tells_a_path_and_what_needs_it_is_known_here(
    recipe: Recipe, chat_model: Path, tmp_path: Path, own_cache: Path
) -> None:
    prune(recipe, tmp_path / "packed")
    text = tmp_path / "text.txt"
    recover(tmp_path / "packed", tmp_path / "recovered", recovering(text))
    moved = (tmp_path / "packed").rename(tmp_path / "elsewhere")
    for folder in (moved, tmp_path / "recovered"):
        check_tells_no_path(folder, tmp_path)
        shown = json.loads((folder / "recipe.json").read_text())
        assert (shown["model"], shown["calibration"]["source"]) == ("a: b #1", "text.txt:1,pydoc:1")
        assert known_baseline(ModelFolder.open(folder))[0] == ModelFolder.open(chat_model)
    assert Recipe.from_file(moved / "recipe.json") == recipe
    prune(Recipe.from_file(moved / "recipe.json"), tmp_path / "again")
    assert content(tmp_path / "again") == content(moved)
    # On another machine, or where the recipe was edited, the file is all there is.
    edited = json.loads((moved / "recipe.json").read_text()) | {"pattern": "0.5"}
    (moved / "recipe.json").write_text(json.dumps(edited))
    assert Recipe.from_file(moved / "recipe.json").model == "a: b #1"
    shutil.rmtree(own_cache)
    found, why = known_baseline(ModelFolder.open(tmp_path / "recovered"))
    assert (found, why) == (
        None, "recipe.json names a: b #1, which is not here; give --baseline"
    )  # fmt: skip


def test_a_cache_that_cannot_be_written_fails_nothing(
    recipe: Recipe, tmp_path: Path, own_cache: Path
) -> None:
    own_cache.write_text("no folder")
    prune(recipe, tmp_path / "packed")
    assert known_baseline(ModelFolder.open(tmp_path / "packed"))[0] is None


def test_an_export_for_onnx_tells_no_path(
    gblm: Run, chat_model: Path, tmp_path: Path, own_cache: Path
) -> None:
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai: make dev installs it")
    done = gblm("export", "onnx", chat_model, "--output", tmp_path / "onnx", "--validate", 0,
                GBLM_CACHE=str(own_cache))  # fmt: skip
    assert done.code == 0, done
    check_tells_no_path(tmp_path / "onnx", tmp_path)
    assert json.loads((tmp_path / "onnx/onnx_report.json").read_text())["source"] == "a: b #1"
    opened = ModelFolder.open(tmp_path / "onnx")
    assert known_baseline(opened) == (ModelFolder.open(chat_model), "named by onnx_report.json")
    check_side_files(tmp_path / "onnx")


def check_tells_no_path(folder: Path, place: Path) -> None:
    for path in folder.rglob("*"):
        assert path.is_dir() or str(place).encode() not in path.read_bytes(), path


def check_side_files(folder: Path) -> None:
    for name, text in SIDE.items():
        assert (folder / name).read_text() == text, name


def test_chat_template_and_generation_settings_survive_every_road(
    recipe: Recipe, chat_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer, GenerationConfig

    # An index of weights in another layout, which stay behind.
    (chat_model / "consolidated.safetensors.index.json").write_text('{"weight_map": {}}')
    prune(recipe, tmp_path / "pruned")
    assert not (tmp_path / "pruned/consolidated.safetensors.index.json").exists()
    recover(tmp_path / "pruned", tmp_path / "recovered", recovering(tmp_path / "text.txt"))
    export_dense(ModelFolder.open(tmp_path / "recovered"), tmp_path / "dense")
    export_pack(tmp_path / "dense", tmp_path / "packed", head="int8")
    for name in ("pruned", "recovered", "dense", "packed"):
        check_side_files(tmp_path / name)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / name)
        chat = [{"role": "user", "content": "x"}]
        assert tokenizer.apply_chat_template(chat, tokenize=False) == "[user]x"
        assert tokenizer.apply_chat_template(chat, tools=[{}, {}], tokenize=False) == "2 tools"
        assert GenerationConfig.from_pretrained(tmp_path / name).top_k == 7


@pytest.mark.parametrize(
    ("card", "licence"),
    [(CARD, ("llama3.2", "https://x.org/a?b=c#d")), (None, ("other", "LICENSE")),
     ("---\nlicense: [\n---\n", ("other", "LICENSE")), ("no header", ("other", "LICENSE"))],
)  # fmt: skip
def test_the_card_is_read_by_the_hubs_own_reader(
    recipe: Recipe, chat_model: Path, tmp_path: Path, card: str | None, licence: tuple[str, str]
) -> None:
    if card is not None:
        (chat_model / "README.md").write_text(card)
    prune(recipe, tmp_path / "packed")
    found = ModelCard.load(tmp_path / "packed" / "README.md").data
    assert (found.license, found.license_link) == licence
    assert found.base_model is None  # no name that a hub could have
    assert found.base_model_relation == "quantized"
    assert {"2:4", "int4", "4-bit", "wanda", "gblm"} <= {*found.tags}
    assert "old" not in found.tags
    named = chat_model.rename(chat_model.with_name("llama-1b"))
    without_text = {"model": str(named), "calibration": None, "method": "magnitude"}
    prune(recipe.model_copy(update=without_text), tmp_path / "named")
    assert ModelCard.load(tmp_path / "named" / "README.md").data.base_model == "llama-1b"


def test_modes_follow_the_umask_which_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0o027)
    try:
        monkeypatch.setattr(os, "umask", None)  # files of other threads would feel a change
        with new_folder(tmp_path / "out") as folder:
            (folder / "within").mkdir(0o700)
            for name in ("config.json", "within/file"):
                (folder / name).touch(0o600)
    finally:
        monkeypatch.undo()
        os.umask(before)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "within"}
    for name, mode in (("", 0o750), ("config.json", 0o640), ("within", 0o750),
                       ("within/file", 0o640)):  # fmt: skip
        assert stat.S_IMODE((tmp_path / "out" / name).stat().st_mode) == mode, name


def test_an_index_of_many_shards_is_pruned_as_one_file_is(
    recipe: Recipe, chat_model: Path, tmp_path: Path
) -> None:
    recipe = recipe.model_copy(update={"calibration": None, "method": "magnitude"})
    prune(recipe, tmp_path / "one")
    tensors = load_file(chat_model / "model.safetensors")
    (chat_model / "model.safetensors").unlink()
    tensors |= {f"extra.{number}": torch.zeros(1) for number in range(120 - len(tensors))}
    places = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        places[name] = f"model-{number + 1:05d}-of-{len(tensors):05d}.safetensors"
        save_file({name: tensor}, chat_model / places[name])
    index = {"metadata": {}, "weight_map": places}
    (chat_model / "model.safetensors.index.json").write_text(json.dumps(index))
    prune(recipe, tmp_path / "many")
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    assert len(places) == 120
    assert all(torch.equal(many[name], tensor) for name, tensor in one.items())
