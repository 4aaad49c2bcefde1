"""Score texts with an exported folder in ONNX Runtime, for `gblm eval`."""

from __future__ import annotations

from torch import Tensor

from gblm.errors import UsageError
from gblm.evaluate.subjects import Scores, Subject
from gblm.export.onnx.decoder import OnnxDecoder
from gblm.model.folder import ModelFolder


class OnnxSubject(Subject):
    """Scores windows with an exported graph, in the precision of its export."""

    engine = "onnx"

    def __init__(self, folder: ModelFolder, dtype: str) -> None:
        """Open the graph.

        Raises:
            UsageError: another dtype than that of the graph was asked for.
        """
        self.folder = folder
        self._decoder = OnnxDecoder(folder.path)
        self.dtype = self._decoder.dtype
        if dtype not in ("auto", self.dtype):
            raise UsageError(
                f"{folder}: the graph computes in {self.dtype}, not in --dtype {dtype}; export it "
                "again with another --precision."
            )

    def score(self, window: Tensor) -> Scores:
        """Score a window [seq_len] int64, from an empty cache."""
        self._decoder.reset()
        return Scores.of(self._decoder.step(window), window)
