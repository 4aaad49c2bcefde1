"""Choose a method for each of vLLM's layers by the manifest of a packed checkpoint."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from gblm import kernels
from gblm.errors import CheckpointError, UsageError
from gblm.kernels import Backend
from gblm.serve.vllm_cli import check_packed, check_version
from gblm.serve.vllm_plugin import metrics
from gblm.serve.vllm_plugin.experts import (
    Arriving,
    DenseExperts,
    ExpertLinear,
    experts_method,
)
from gblm.serve.vllm_plugin.head import EmbeddingMethod, HeadMethod, PackedHeadMethod
from gblm.serve.vllm_plugin.linear import DenseLinearMethod, SparseLinearMethod
from gblm.serve.vllm_plugin.tied import TiedEmbeddingMethod, TiedHeadMethod
from gblm.sparse.formats import Format, join_formats
from gblm.sparse.formats.manifest import QUANT_METHOD, Manifest

logger = logging.getLogger(__name__)


@register_weight_loader_v2_supported_method
class NarrowLinearMethod(SparseLinearMethod):
    """The method serves a linear whose codes have fewer bits than kernels know."""

    def _prepare(self, layer: torch.nn.Module, parts: dict[str, torch.Tensor]) -> None:
        self.fmt, known = self.fmt.widened(), self.fmt.widen(parts)
        super()._prepare(layer, dict(known))


class WideArriving(Arriving):
    """Collects the parts of a layer's experts, and widens codes of fewer bits than kernels know."""

    def __init__(self, layer: RoutedExperts, prefix: str, manifest: Manifest) -> None:
        """See Arriving."""
        super().__init__(layer, prefix, manifest)
        self.stored = {linear.name: linear for linear in self.linears.values()}
        for key, linear in self.linears.items():
            self.linears[key] = linear._replace(fmt=linear.fmt.widened())

    def _cut(
        self, linear: ExpertLinear, parts: dict[str, torch.Tensor], is_down: bool
    ) -> dict[str, torch.Tensor]:
        stored = self.stored[linear.name]
        return dict(stored.fmt.widen(super()._cut(stored, parts, is_down)))


class SparseConfig(QuantizationConfig):
    """Tells vLLM how each layer of a packed checkpoint is made, as its manifest says."""

    def __init__(self, manifest: Manifest | None = None, reports: Path | None = None) -> None:
        """Take the manifest; vLLM gives none for `--quantization gblm` of a model without one.

        Raises:
            UsageError: there is no manifest.
            MachineError: vLLM is none that the plugin was tested with.
        """
        super().__init__()
        check_version()
        if manifest is None:
            raise UsageError(
                "--quantization gblm: this model is not packed. Leave the option out, or use "
                "`gblm serve DIR --pack`, which packs the zeros of a dense model first."
            )
        self.manifest = manifest
        self.reports = reports or metrics.reports().new_folder()
        self.num_created = 0
        self._chosen: list[tuple[Backend, Sequence[str]]] = []
        self._tied: dict[str, torch.nn.Module] = {}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseConfig:
        """Check vLLM's version and the "quantization_config" object."""
        check_version()
        return cls(Manifest.from_config(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Note what a compiled graph depends on where the key of vLLM's cache covers it.

        Raises:
            InputError: vLLM has no place for the packed output head.
        """
        if hf_config is not None:
            check_packed(hf_config.to_dict(), self.manifest)
            hf_config.gblm_backend = kernels.requested_backend() or "best"

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Call what the manifest names as vLLM does, whose multimodal models have other names."""
        self.manifest = self.manifest.renamed(hf_to_vllm_mapper.map_name)

    def get_name(self) -> str:
        """Give the quant_method."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """List the dtypes that floating values are cast to at load; codes and scales serve any."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Give the least compute capability of CUDA devices."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """List no files: the manifest stands in config.json."""
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Choose a method for linears, experts, embeddings and the output head; else vLLM's own."""
        if isinstance(layer, ParallelLMHead):
            return self._head_method(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return self._embedding_method(layer, prefix)
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        fmt = self._format_of(prefix)
        if fmt is None:
            return DenseLinearMethod(prefix)
        self.num_created += 1
        kind = SparseLinearMethod if fmt.values.bits in Format.bits else NarrowLinearMethod
        return kind(fmt, prefix, self.note_choice)

    def note_choice(self, backend: Backend, reasons: Sequence[str]) -> None:
        """Take note of a prepared linear; the last one writes the log line of the model.

        Args:
            backend: the one that runs it.
            reasons: why better backends refused.
        """
        self._chosen.append((backend, reasons))
        if len(self._chosen) < self.num_created:
            return
        _show_logs()
        kernels.log_choice(self._chosen)
        metrics.report(self.reports, Counter(backend.name for backend, _ in self._chosen))
        self._chosen.clear()

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase:
        arriving = WideArriving(layer, prefix, self.manifest)
        if not arriving.is_packed:
            if layer.use_ep and torch.device(layer.moe_config.device).type == "cpu":
                raise UsageError(
                    f"{prefix} is not packed, and vLLM's own experts have no expert parallelism on "
                    "CPU: leave --enable-expert-parallel out."
                )
            return DenseExperts(layer.moe_config, prefix)
        self.num_created += len(arriving.linears)
        return experts_method(layer, arriving, self.note_choice)

    def _embedding_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase:
        if not self.manifest.tied:
            return EmbeddingMethod(prefix)
        # vLLM gives some embeddings no name; a model has only these.
        self._tied = dict.fromkeys(self.manifest.tied.values(), layer)
        return TiedEmbeddingMethod()

    def _head_method(self, prefix: str) -> QuantizeMethodBase:
        fmt = self.manifest.format_of(prefix)
        if fmt is None:
            return HeadMethod(prefix)
        if fmt.name != "dense":
            raise CheckpointError(
                f"{prefix}: vLLM serves an output head in the format dense, not {fmt.name}."
            )
        self.num_created += 1
        if (embeddings := self._tied.get(prefix)) is not None:
            return TiedHeadMethod(fmt, prefix, self.note_choice, embeddings)
        return PackedHeadMethod(fmt, prefix, self.note_choice)

    def _format_of(self, prefix: str) -> Format | None:
        """Find the format of a layer; the parts of a fused one (q/k/v, gate/up) must fit."""
        parent, _, name = prefix.rpartition(".")
        pieces = self.packed_modules_mapping.get(name, [name])
        found = [self.manifest.format_of(f"{parent}.{piece}") for piece in pieces]
        packed = [fmt for fmt in found if fmt is not None]
        if not packed:
            return None
        joined = join_formats(packed) if len(packed) == len(found) else None
        if joined is None:
            raise CheckpointError(
                f"{prefix}: vLLM fuses {', '.join(pieces)}, but they are stored in different "
                "formats. Prune all of them alike, or ignore all of them."
            )
        return joined


def _show_logs() -> None:
    """Let our log speak through vLLM's, which shows its own loggers only."""
    ours = logging.getLogger("gblm")
    if not ours.handlers:
        for handler in logging.getLogger("vllm").handlers:
            ours.addHandler(handler)
        ours.setLevel(logging.INFO)
