"""Files that lie: every one is refused with a sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gblm.errors import CheckpointError, InputError, MachineError
from gblm.model.folder import ModelFolder
from gblm.model.reader import Reader


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(4, 4), "b": torch.zeros(2)}, tmp_path / "model.safetensors")
    return tmp_path


def shard(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))


def with_header(path: Path, header: dict[str, object], data: bytes) -> None:
    """Write a safetensors file by hand, true or not."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def test_headers_are_known_before_data_is_read(folder: Path) -> None:
    with Reader(ModelFolder(folder, {})) as reader:
        assert reader.headers == {"a": ((4, 4), torch.float32), "b": ((2,), torch.float32)}
        assert reader.num_bytes("a") == 64
        assert torch.equal(reader.tensor("a"), torch.ones(4, 4))
        with pytest.raises(CheckpointError, match="tensor c is missing"):
            reader.tensor("c")


class OtherThread(dict):
    """Handles that another thread lets go of as soon as one is looked for or kept."""

    def __contains__(self, key: object) -> bool:
        found = super().__contains__(key)
        self.clear()
        return found

    def get(self, key: object, default: object = None) -> object:
        found = super().get(key, default)
        self.clear()
        return found

    def __setitem__(self, key: object, value: object) -> None:
        self.clear()


@pytest.mark.parametrize("is_open", [True, False])
def test_another_thread_may_let_go_of_the_files(folder: Path, is_open: bool) -> None:
    with Reader(ModelFolder(folder, {})) as reader:
        reader._handles = OtherThread(reader._handles if is_open else {})
        assert torch.equal(reader.tensor("a"), torch.ones(4, 4))


def test_shards_are_read_through_the_index(folder: Path) -> None:
    shard(folder, {"a": "part.safetensors", "b": "part.safetensors"})
    with Reader(ModelFolder(folder, {})) as reader:
        assert sorted(reader) == ["a", "b"]


@pytest.mark.parametrize(
    "name",
    ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "../../blobs/1234"],
)
def test_shard_names_cannot_leave_the_folder(folder: Path, name: str) -> None:
    shard(folder, {"a": name})
    with pytest.raises(CheckpointError, match=r"file name .* leads out of the folder"):
        Reader(ModelFolder(folder, {}))


@pytest.mark.parametrize("name", ["x" * 256, "a\0b", "\ud800.safetensors"])
def test_shard_names_that_no_file_can_have_are_refused(folder: Path, name: str) -> None:
    shard(folder, {"a": name})
    with pytest.raises(CheckpointError, match="no file can have the name"):
        Reader(ModelFolder(folder, {}))


def test_links_of_a_hub_snapshot_are_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshots/abc").mkdir(parents=True)
    save_file({"a": torch.ones(1)}, tmp_path / "blobs/1234")
    (tmp_path / "snapshots/abc/model.safetensors").symlink_to("../../blobs/1234")
    with Reader(ModelFolder(tmp_path / "snapshots/abc", {})) as reader:
        assert list(reader) == ["a"]


@pytest.mark.parametrize(
    "weight_map", [None, [], {"a": "missing.safetensors"}, {"c": "part.safetensors"}]
)
def test_index_that_does_not_fit(folder: Path, weight_map: object) -> None:
    shard(folder, weight_map)
    with pytest.raises(CheckpointError):
        Reader(ModelFolder(folder, {}))


def test_folder_without_safetensors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no"):
        Reader(ModelFolder(tmp_path, {}))
    (tmp_path / "odd-name.safetensors").touch()
    with pytest.raises(CheckpointError, match="neither"):
        Reader(ModelFolder(tmp_path, {}))


def test_a_file_too_large_to_map_is_the_machine_s_fault(tmp_path: Path) -> None:
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this system promises any amount of memory")
    size = 1 << 43  # 8 TiB, of which nothing is stored
    path = tmp_path / "model.safetensors"
    with_header(path, {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, b"")
    try:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size + size)
    except OSError:
        pytest.skip("the file system takes no file of 8 TiB")
    with pytest.raises(MachineError, match=r"cannot be mapped into memory .* in smaller shards"):
        Reader(ModelFolder(tmp_path, {}))
