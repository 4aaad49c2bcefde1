"""Reader: the tensors of a model folder by name. Trusts nothing that stands in the files.

Only safetensors are opened. A shard name may not lead out of the folder, headers are looked at
before data, and every defect of a file becomes one sentence.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gblm.errors import CheckpointError, MachineError
from gblm.files import read_json, sha256
from gblm.model.folder import ModelFolder, check_weights

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
Header = tuple[tuple[int, ...], torch.dtype]
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class Cut(NamedTuple):
    """A Cut says where a matrix lies in a stored tensor [experts, …].

    Attributes:
        whole: name of the tensor.
        shape: of the tensor.
        place: one expert, and rows or columns of it.
        transposed: whether it is stored as [in, out].
    """

    whole: str
    shape: tuple[int, ...]
    place: tuple[slice, ...]
    transposed: bool

    def take(self, tensor: Any) -> Tensor:
        """Return the matrix [out, in], from the tensor or from a slice of its file."""
        matrix: Tensor = tensor[self.place][0]
        return matrix.t().contiguous() if self.transposed else matrix

    def put(self, matrix: Tensor, tensor: Tensor) -> None:
        """Write the matrix [out, in] to its place in the tensor."""
        tensor[self.place][0] = matrix.t() if self.transposed else matrix


class Reader:
    """A reader holds the open shards of one folder, and closes them as a context manager.

    Attributes:
        folder: the model folder.
        headers: shape and dtype by tensor name; see `rename`.
        files: names of the shards and of the index that lists them.
        unlisted: tensors in a shard that the index does not promise there, and are not read.
    """

    def __init__(self, folder: ModelFolder) -> None:
        """Open the shards and read their headers.

        Raises:
            CheckpointError: a file is missing, truncated, malformed or outside the folder.
            MachineError: a file is larger than this machine lets a process map.
        """
        check_weights(folder.path)
        self.folder = folder
        self.headers: dict[str, Header] = {}
        self.files: set[str] = set()
        self.unlisted: list[str] = []
        self._handles: dict[str, Any] = {}
        self._file_of: dict[str, str] = {}
        self._stored_names: dict[str, str] = {}
        self._cuts: dict[str, Cut] = {}
        shards = _shards(folder.path)
        self.files = {*shards} if SINGLE in shards else {*shards, INDEX}
        for file, expected in shards.items():
            handle = self._open(file)
            names = set(handle.keys())
            if expected is not None and (missing := expected - names):
                raise CheckpointError(
                    f"{folder.path / file}: {sorted(missing)[0]} is missing, though {INDEX} "
                    "promises it."
                )
            self.unlisted += sorted(names - (names if expected is None else expected))
            for name in sorted(names if expected is None else expected):
                self.headers[name] = self._header(file, handle, name)
                self._file_of[name] = file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handles.clear()

    def __iter__(self) -> Iterator[str]:
        return iter(self.headers)

    def __contains__(self, name: object) -> bool:
        return name in self.headers

    def rename(self, names: Mapping[str, str]) -> None:
        """Call tensors as the model in memory does, see `gblm.model.loading.names_in_memory`.

        Args:
            names: by the name that a tensor is stored under; others keep theirs.
        """
        self._stored_names = {new: stored for stored, new in names.items()}
        self.headers = {names.get(name, name): header for name, header in self.headers.items()}

    def split(self, cuts: Mapping[str, Cut]) -> None:
        """Let matrices of stored tensors be tensors of their own, in place of those.

        Args:
            cuts: by the matrix's name; those of tensors that are not stored are passed over.

        Raises:
            CheckpointError: a matrix is stored by itself as well, or a tensor has another shape.
        """
        found = {name: cut for name, cut in cuts.items() if cut.whole in self.headers}
        for name, cut in found.items():
            shape, dtype = self.headers[cut.whole]
            if name in self.headers:
                raise CheckpointError(
                    f"{self.folder}: {name} is stored twice, by itself and in {cut.whole}."
                )
            if shape != cut.shape:
                raise CheckpointError(
                    f"{self.folder}: {cut.whole} is stored as {list(shape)}, but config.json makes "
                    f"it {list(cut.shape)}."
                )
            matrix = cut.take(torch.empty(shape, device="meta"))
            self.headers[name] = tuple(matrix.shape), dtype
        for whole in {cut.whole for cut in found.values()}:
            del self.headers[whole]
        self._cuts |= found

    def stored_name(self, name: str) -> str:
        """Return the name that a tensor is stored under."""
        return self._stored_names.get(name, name)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor into memory."""
        if name not in self.headers:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing.")
        return self._load(name)

    def _load(self, name: str) -> Tensor:
        cut = self._cuts.get(name)
        stored = self.stored_name(cut.whole if cut else name)
        try:
            file = self._open(self._file_of[stored])
            tensor = cut.take(file.get_slice(stored)) if cut else file.get_tensor(stored)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {error}") from error
        return tensor

    def refuse_unlisted(self) -> None:
        """Refuse shards that no index lists: hosts load every shard they find, these too.

        Raises:
            CheckpointError: there is one.
        """
        for path in self.folder.path.glob("*.safetensors*"):
            if path.name not in self.files:
                raise CheckpointError(f"{path} belongs to no index; remove it.")

    def release(self) -> None:
        """Let go of the files' pages, which count as this process's memory while they are mapped.

        The next read maps the file again; tensors read before and not copied keep theirs.
        """
        self._handles.clear()

    def sha256(self) -> str:
        """Hash config.json and the shards; all of them are read."""
        digest = hashlib.sha256()
        for name in sorted({"config.json", *self.files}):
            digest.update(f"{name} {sha256(self.folder.file(name))}\n".encode())
        return digest.hexdigest()

    def num_bytes(self, name: str) -> int:
        """Return the size of a tensor's data, from its header."""
        shape, dtype = self.headers[name]
        return math.prod(shape) * dtype.itemsize

    def _open(self, file: str) -> Any:
        if (handle := self._handles.get(file)) is not None:
            return handle
        path = self.folder.file(file)
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is no ordinary file.")
        try:
            handle = self._handles[file] = safe_open(path, framework="pt")
        except FileNotFoundError as error:
            raise CheckpointError(f"{path} is missing.") from error
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is no intact safetensors file ({error}). Copy it again from its source."
            ) from error
        except RuntimeError as error:  # PyTorch maps the whole file
            raise MachineError(
                f"{path} cannot be mapped into memory ({error}): store the model in smaller shards."
            ) from error
        return handle

    def _header(self, file: str, handle: Any, name: str) -> Header:
        part = handle.get_slice(name)
        dtype = str(part.get_dtype())
        if dtype not in DTYPES:
            raise CheckpointError(f"{self.folder.path / file}: {name} has unknown dtype {dtype}.")
        return tuple(part.get_shape()), DTYPES[dtype]


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """Map each shard to the tensors that the index expects in it; None takes whatever it holds."""
    if (folder / SINGLE).exists():
        return {SINGLE: None}
    index = folder / INDEX
    if not index.exists():
        raise CheckpointError(f"{folder} holds neither {SINGLE} nor {INDEX}.")
    found = read_json(index)
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is no safetensors index: it has no weight_map.")
    if not isinstance(found.get("metadata", {}), dict):
        raise CheckpointError(f"{index} is no safetensors index: its metadata are no object.")
    shards: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        expected = shards.setdefault(str(file), set())
        if expected is not None:
            expected.add(name)
    return shards
