"""An exported folder in ONNX Runtime on CPU, for `gblm eval`."""

from __future__ import annotations

from torch import Tensor

from gblm.errors import UsageError
from gblm.evaluate.subjects import ONNX_REPORT, Scores, Subject
from gblm.export.onnx_model.decoder import OrtDecoder
from gblm.files import read_json
from gblm.model.folder import ModelFolder


class OnnxSubject(Subject):
    """Scores windows with an exported graph, in the precision of its export."""

    engine = "onnx"

    def __init__(self, folder: ModelFolder, dtype: str) -> None:
        """Open the graph.

        Raises:
            UsageError: it computes in another dtype, or in one that ONNX Runtime lacks on CPU.
        """
        _refuse_bfloat16(folder, dtype)
        self._decoder = OrtDecoder(folder.path)
        kinds = {node.name: node.type for node in self._decoder.session.get_outputs()}
        names = {"float": "float32", "float16": "float16", "bfloat16": "bfloat16"}
        self.dtype = names[kinds["logits"][len("tensor(") : -1]]
        if dtype not in ("auto", self.dtype):
            raise UsageError(
                f"{folder}: the graph computes in {self.dtype}, not in --dtype {dtype}; export it "
                "again with another --precision."
            )

    def score(self, window: Tensor) -> Scores:
        """Score a window [seq_len] int64, from an empty cache."""
        self._decoder.reset()
        return Scores.of(self._decoder.step(window), window)


def _refuse_bfloat16(folder: ModelFolder, dtype: str) -> None:
    """Say what ONNX Runtime's own words on a missing MatMul do not."""
    report = folder.path / ONNX_REPORT
    precision = read_json(report).get("precision") if report.is_file() else None
    if "bfloat16" in (dtype, {"bf16": "bfloat16"}.get(str(precision))):
        raise UsageError(
            f"{folder}: --engine onnx runs on CPU, where ONNX Runtime has no MatMul for bfloat16: "
            "evaluate the folder that it was exported from, with --engine hf, packed or vllm."
        )
