"""`gblm serve --prune`: once into the cache, then from there; nothing here starts vLLM."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome, content

import gblm.serve.pruned as pruned
from gblm.checkpoint.verify import verify
from gblm.commands import prune as prune_command
from gblm.errors import InputError, PatternError, UsageError
from gblm.prune import prune
from gblm.recipe import Recipe
from gblm.serve.pruned import pruned_folder, recipe_of

Run = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GBLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pruned"


def test_the_second_start_uses_what_the_first_made(
    tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pruned_folder(tiny, "magnitude 2:4")
    assert folder.parent == cache
    assert "magnitude" in folder.name
    verify(folder)
    prune(Recipe(model=str(tiny), method="magnitude", calibration=None), tmp_path / "same")
    assert content(folder) == content(tmp_path / "same")

    def unwanted(*_: object) -> None:
        raise AssertionError("pruned twice")

    monkeypatch.setattr(pruned, "prune", unwanted)
    assert pruned_folder(tiny, "magnitude  2:4") == folder
    moved = Path(shutil.copytree(tiny, tmp_path / tiny.name))
    assert pruned_folder(moved, "magnitude 2:4") == folder


def test_another_recipe_model_or_version_gets_a_folder_of_its_own(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Path(shutil.copytree(tiny, tmp_path / tiny.name))
    places = [pruned._place(recipe_of(tiny, words), tiny) for words in ("gblm 2:4", "gblm 0.5")]
    for name in ("model.safetensors", "tokenizer.json"):
        path = other / name
        raw = bytearray(path.read_bytes())
        raw[-2] ^= 1
        path.write_bytes(raw)
        places.append(pruned._place(recipe_of(tiny, "gblm 2:4"), other))
    monkeypatch.setattr(pruned, "__version__", "0.0.0")
    places.append(pruned._place(recipe_of(tiny, "gblm 2:4"), tiny))
    assert len(set(places)) == len(places)


def test_a_run_that_fails_leaves_nothing_to_serve(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gblm.checkpoint import packer

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(packer, "_write_side_files", full)
        with pytest.raises(Exception, match="No space left"):
            pruned_folder(tiny, "magnitude 2:4")
    assert not [path for path in cache.iterdir() if not path.name.startswith(".")]
    verify(pruned_folder(tiny, "magnitude 2:4"))


def test_defaults_are_those_of_gblm_prune(tiny: Path) -> None:
    from gblm.commands.recipe_options import read_recipe

    context = prune_command.command.make_context("prune", [str(tiny), "--output", "o"])
    given = {k: v for k, v in context.params.items() if k not in (*prune_command.OWN, "recipe")}
    assert recipe_of(tiny, "gblm 2:4") == read_recipe(context, None, given, prune_command.OWN)


@pytest.mark.parametrize("words", ["gblm", "2:4", "gblm 2:4 fast", "wunda 2:4", ""])
def test_two_known_words_are_wanted(tiny: Path, words: str) -> None:
    with pytest.raises(UsageError, match=r"give a method and a pattern|choose from"):
        recipe_of(tiny, words)


def test_what_cannot_be_pruned_is_refused(tiny: Path, packed: Path) -> None:
    with pytest.raises(PatternError, match="N weights kept of M"):
        recipe_of(tiny, "gblm 4:2")
    with pytest.raises(InputError, match="it is packed already"):
        pruned_folder(packed, "magnitude 2:4")


@pytest.mark.vllm
def test_the_command_prunes_then_starts_vllm_on_the_result(
    gblm: Run, tiny: Path, cache: Path, tmp_path: Path
) -> None:
    # In place of vLLM: a process that ends as soon as it runs.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if 'gblm.serve.vllm_cli' in sys.orig_argv:\n"
        "    print('SERVED', sys.orig_argv, flush=True); os._exit(0)\n"
    )
    paths = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = gblm("serve", tiny, "--prune", "magnitude 2:4", PYTHONPATH=paths)
    assert done.code == 1, done  # it ended unasked
    (folder,) = (path for path in cache.iterdir() if not path.name.startswith("."))
    assert f"into {folder}" in done.err
    assert "SERVED" in done.out
    assert str(folder) in done.out
    assert f"'--served-model-name', '{tiny.name}'" in done.out
