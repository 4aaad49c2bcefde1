"""Initializers in one external file under a fixed name, each where a cache line begins.

Names in a graph are never used as paths: data come from, and go to, the one file beside the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gblm.errors import CheckpointError
from gblm.export.onnx.runtime import MODEL_FILE

DATA_FILE = f"{MODEL_FILE}.data"
# Smaller ones stay in the graph, where shape inference sees them.
INLINE_BYTES = 1024
# What the kernels want of panels; ONNX Runtime maps whole pages around it.
ALIGNMENT = 64


class StoredGraph:
    """A graph `model` on disk; its initializers, `tensors` by name, are read when asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the graph.

        Raises:
            CheckpointError: there is none, or its data would come from another file.
        """
        import onnx

        self.folder = folder
        try:
            self.model: Any = onnx.load(str(folder / MODEL_FILE), load_external_data=False)
        except Exception as error:
            raise CheckpointError(f"{folder / MODEL_FILE} is no ONNX model: {error}") from error
        self.tensors: dict[str, Any] = {t.name: t for t in self.model.graph.initializer}
        self._data: np.ndarray[Any, Any] | None = None
        for tensor in self.tensors.values():
            place = _place(tensor)
            if place is not None and place["location"] != DATA_FILE:
                raise CheckpointError(
                    f"{folder}: {tensor.name} lies in {place['location']!r}, not in {DATA_FILE}."
                )

    def raw(self, name: str) -> np.ndarray[Any, Any]:
        """Read an initializer as [bytes] uint8."""
        import onnx

        tensor = self.tensors[name]
        place = _place(tensor)
        if place is None:
            held = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
            return np.frombuffer(held, dtype=np.uint8)
        if self._data is None:
            self._data = np.memmap(self.folder / DATA_FILE, dtype=np.uint8, mode="r")
        start = int(place.get("offset", 0))
        stop = start + int(place["length"]) if "length" in place else len(self._data)
        if stop > len(self._data):
            raise CheckpointError(f"{self.folder / DATA_FILE} is cut off before {name}.")
        return self._data[start:stop]

    def floats(self, name: str) -> np.ndarray[Any, Any]:
        """Read an initializer in its shape as float32."""
        tensor = self.raw(name).view(self.dtype(name)).reshape(tuple(self.tensors[name].dims))
        return tensor.astype(np.float32, copy=False)

    def dtype(self, name: str) -> np.dtype[Any]:
        """Give the dtype of an initializer."""
        import onnx

        return np.dtype(onnx.helper.tensor_dtype_to_np_dtype(self.tensors[name].data_type))


class DataFile:
    """Writes external data into DATA_FILE."""

    def __init__(self, stream: BinaryIO) -> None:
        """Take the file, opened for writing."""
        self._stream = stream

    def tensor(self, name: str, dtype: int, shape: Iterable[int], data: Any) -> Any:
        """Make an `onnx.TensorProto`; its data go into the file, or inline when they are few.

        Args:
            name: of the initializer.
            dtype: a member of `onnx.TensorProto.DataType`.
            shape: its dimensions.
            data: its bytes, as a buffer.
        """
        import onnx

        made = onnx.TensorProto(name=name, data_type=dtype, dims=list(shape))
        size = memoryview(data).nbytes
        if size < INLINE_BYTES:
            made.raw_data = bytes(data)
            return made
        self._stream.write(b"\0" * (-self._stream.tell() % ALIGNMENT))
        made.data_location = onnx.TensorProto.EXTERNAL
        place = {"location": DATA_FILE, "offset": self._stream.tell(), "length": size}
        for key, value in place.items():
            made.external_data.add(key=key, value=str(value))
        self._stream.write(data)
        return made


def _place(tensor: Any) -> dict[str, str] | None:
    """Tell where external data lie; None if they are in the graph."""
    if not tensor.external_data:
        return None
    return {entry.key: entry.value for entry in tensor.external_data}
