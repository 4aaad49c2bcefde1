"""What `gblm serve` makes in the cache before it serves: once, complete, and by one process."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Pack, Run, content, in_place_of_vllm
from damage import flip
from legacy_cases import FIXTURES, altered, drop

import gblm.serve.cached as cached
from gblm.checkpoint.inspect import verify
from gblm.checkpoint.write import folder_bytes
from gblm.errors import InputError, MachineError
from gblm.export.dense import export_dense
from gblm.export.legacy import export_legacy
from gblm.export.pack import export_pack
from gblm.model.folder import ModelFolder
from gblm.serve.cached import folder_to_serve, is_legacy

CONVERTED = ("bitmask", "bitmask-0.8", "24-bitmask", "24-int8-channel", "24-int8-group", "24-fp8",
             "marlin-int4", "marlin-int8", "dense")  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GBLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GBLM_ALLOW_UNTESTED_VLLM", "1")  # none is needed here
    return tmp_path / "cache" / "served"


def made(cache: Path) -> list[Path]:
    """The folders in the cache that have their name."""
    return [path for path in cache.glob("*") if not path.name.startswith(".")]


@pytest.fixture
def zeros(pack_tiny: Pack, tmp_path: Path) -> Path:
    """A dense folder with zeros."""
    export_dense(ModelFolder.open(pack_tiny()), tmp_path / "zeros")
    return tmp_path / "zeros"


def test_another_model_or_version_gets_a_folder_of_its_own(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def place(model: Path) -> Path:
        return cached._place("title", ModelFolder.open(model))

    other = Path(shutil.copytree(tiny, tmp_path / tiny.name))
    assert place(other) == place(tiny)
    places = [place(tiny), cached._place("other", ModelFolder.open(tiny))]
    for name in ("model.safetensors", "tokenizer.json"):
        flip(name, -2)(other)
        places.append(place(other))
    (other / "additional_chat_templates").mkdir()
    (other / "additional_chat_templates/tool_use.jinja").touch()
    places.append(place(other))
    monkeypatch.setattr(cached, "computing_versions", lambda: {"gblm": "0.0.0"})
    places.append(place(tiny))
    assert len(set(places)) == len(places)


def test_a_run_that_fails_leaves_nothing_to_serve(
    zeros: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gblm.checkpoint import pack

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pack, "write_side_files", full)
        with pytest.raises(Exception, match="No space left"):
            folder_to_serve(zeros, pack=True)
    assert made(cache) == []
    verify(ModelFolder.open(folder_to_serve(zeros, pack=True)))


def test_a_packed_or_dense_folder_is_served_from_where_it_is(
    tiny: Path, packed: Path, cache: Path
) -> None:
    assert folder_to_serve(packed) == packed
    assert folder_to_serve(tiny) == tiny
    assert not cache.exists()


@pytest.mark.parametrize("fixture", ["24-int8-group", "dense"])
def test_a_folder_of_compressed_tensors_is_converted(
    fixture: str, cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gblm")
    folder = folder_to_serve(FIXTURES / fixture)
    export_legacy(FIXTURES / fixture, tmp_path / "same")
    assert content(folder) == content(tmp_path / "same")
    verify(ModelFolder.open(folder))
    size = f"{folder_bytes(folder) / 1e6:.1f} MB"
    assert f"serving from {folder}, {size}" in caplog.text
    before = folder.stat().st_ino
    assert folder_to_serve(FIXTURES / fixture) == folder
    assert folder.stat().st_ino == before


def test_zeros_of_a_dense_folder_are_packed_when_the_user_asks(
    zeros: Path, packed: Path, cache: Path, tmp_path: Path
) -> None:
    assert folder_to_serve(zeros) == zeros
    folder = folder_to_serve(zeros, pack=True)
    export_pack(zeros, tmp_path / "same")
    assert content(folder) == content(tmp_path / "same")
    assert folder_to_serve(zeros, pack=True) == folder
    assert made(cache) == [folder]
    with pytest.raises(InputError, match="it is packed already"):
        folder_to_serve(packed, pack=True)


def test_without_room_nothing_is_begun(
    zeros: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    for model, pack in ((FIXTURES / "bitmask", False), (zeros, True)):
        with pytest.raises(MachineError, match=r"0\.00 GB free; up to .* are needed"):
            folder_to_serve(model, pack)
    assert made(cache) == []


def test_a_cache_that_cannot_be_written_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GBLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(MachineError, match="cannot hold bitmask-converted"):
        folder_to_serve(FIXTURES / "bitmask")


def test_two_servers_at_once_make_it_once(cache: Path) -> None:
    code = (
        "import sys, logging; logging.basicConfig(level=logging.INFO)\n"
        "from gblm.serve.cached import folder_to_serve\n"
        "print(folder_to_serve(sys.argv[1]))"
    )
    place = cached._place("bitmask-converted", ModelFolder.open(FIXTURES / "bitmask"))
    cache.mkdir(parents=True)
    words = [sys.executable, "-c", code, str(FIXTURES / "bitmask")]
    with (cache / f".{place.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        servers = [
            subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for _ in range(2)
        ]
        logs = [server.stderr.readline() for server in servers]
        assert made(cache) == []
    ended = [server.communicate() for server in servers]
    logs = [first + log for first, (_, log) in zip(logs, ended, strict=True)]
    assert [out.strip() for out, _ in ended] == [str(place)] * 2, logs
    assert all("waiting for another process" in log for log in logs)
    assert sum("making" in log for log in logs) == 1
    assert sum("using what an earlier start made" in log for log in logs) == 1


def test_what_cannot_be_converted_cannot_be_served(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(InputError, match=r"up_proj\.bitmask is missing"):
        folder_to_serve(altered(tmp_path, "bitmask", drop("bitmask")))
    assert made(cache) == []


def quantization(fixture: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((FIXTURES / fixture / "config.json").read_text())
    return config["quantization_config"]


def declaring(fields: dict[str, Any] | None) -> ModelFolder:
    return ModelFolder(Path(), {"quantization_config": fields})


def test_only_what_vllm_refuses_is_converted() -> None:
    for fixture in CONVERTED:
        assert is_legacy(declaring(quantization(fixture)))
    sparse = quantization("bitmask")
    plain = sparse["sparsity_config"] | {"format": "dense", "targets": []}
    for fields in (
        None,
        {"quant_method": "gblm"},
        {"quant_method": "fp8"},
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        sparse | {"sparsity_config": {}},
        sparse | {"sparsity_config": plain},
    ):
        assert not is_legacy(declaring(fields))
    for name in ("os:system", "../x", "__import__('os')", "", None, 7, ["marlin-24"]):
        config = sparse | {"sparsity_config": sparse["sparsity_config"] | {"format": name}}
        assert not is_legacy(declaring(config))


@pytest.mark.vllm
def test_the_command_packs_then_starts_vllm_on_the_result(
    gblm: Run, zeros: Path, cache: Path, tmp_path: Path
) -> None:
    # In place of vLLM: a process that ends as soon as it runs.
    paths = in_place_of_vllm(tmp_path, "print('SERVED', sys.orig_argv, flush=True); os._exit(0)")
    done = gblm("serve", zeros, "--pack", PYTHONPATH=paths)
    assert done.code == 1, done  # it ended unasked
    (folder,) = made(cache)
    assert f"serving from {folder}" in done.err
    assert "SERVED" in done.out
    assert str(folder) in done.out
    assert f"'--served-model-name', '{zeros.name}'" in done.out
