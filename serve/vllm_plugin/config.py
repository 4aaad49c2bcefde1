"""SparseConfig: from a manifest, or a foreign model, to a method for each of vLLM's layers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from gblm import kernels
from gblm.errors import CheckpointError
from gblm.folder import LEGACY_METHOD, legacy_format
from gblm.formats import Format, join_formats
from gblm.formats.manifest import QUANT_METHOD, Manifest
from gblm.formats.nm import NMFormat
from gblm.kernels import Backend
from gblm.serve.foreign import Foreign, is_legacy
from gblm.serve.versions import check_version
from gblm.serve.vllm_plugin import metrics
from gblm.serve.vllm_plugin.found import FoundLinearMethod
from gblm.serve.vllm_plugin.head import EmbeddingMethod, HeadMethod, PackedHeadMethod
from gblm.serve.vllm_plugin.linear import DenseLinearMethod, SparseLinearMethod
from gblm.serve.vllm_plugin.prepared import Stored
from gblm.serve.vllm_plugin.stream import ForeignMapper

logger = logging.getLogger(__name__)


class SparseConfig(QuantizationConfig):
    """The packed weights of one checkpoint, as vLLM asks for them.

    Attributes:
        manifest: of a folder of ours; None for models that others made.
        reports: the folder where workers leave what /metrics says of them.
        foreign: such a model, once vLLM has said where it is.
        num_created: how many linears are to be prepared.
    """

    def __init__(self, manifest: Manifest | None = None, reports: Path | None = None) -> None:
        """Without a manifest when config.json has none: `--quantization gblm` of a dense model."""
        super().__init__()
        check_version()
        self.manifest = manifest
        self.reports = reports or metrics.reports().new_folder()
        self.foreign: Foreign | None = None
        self.num_created = 0
        self._chosen: list[tuple[Backend | None, Sequence[str]]] = []
        self._held: list[Stored] = []

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim what compressed-tensors wrote sparse; None leaves a checkpoint to vLLM."""
        config = {"quantization_config": hf_quant_cfg}
        if user_quant == QUANT_METHOD:
            return QUANT_METHOD if legacy_format(config) else None
        ours = user_quant in (None, LEGACY_METHOD) and is_legacy(config)
        return QUANT_METHOD if ours else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseConfig:
        """Check vLLM's version and the "quantization_config" object."""
        check_version()
        if legacy_format({"quantization_config": config}):
            return cls()
        return cls(Manifest.from_config(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Look into a model that others made, before any process loads it.

        What a compiled graph depends on is noted in `hf_config`: the key of vLLM's cache covers it.
        """
        if self.manifest is None:
            self.foreign = Foreign.open(model_name, revision)
        if hf_config is not None:
            hf_config.gblm_backend = kernels.requested_backend() or "best"
            hf_config.gblm_packing = "" if self.foreign is None else self.foreign.stamp

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """A foreign model's tensors become ours on the way."""
        mapper = super().get_checkpoint_weight_mapper()
        if self.foreign is None or not self.foreign.owners:
            return mapper
        return ForeignMapper.around(mapper, self.foreign)

    def get_name(self) -> str:
        """The quant_method."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Floating values are cast to it at load; codes and scales serve any."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Of CUDA devices; the backends here are plain PyTorch."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the manifest stands in config.json."""
        return []

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """Methods of ours for packed linears, embeddings and the output head; else vLLM's own."""
        if isinstance(layer, ParallelLMHead):
            return self._head_method(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return EmbeddingMethod(prefix)
        if not isinstance(layer, LinearBase):
            return None
        fmt = self._format_of(prefix)
        if fmt is None:
            return DenseLinearMethod(prefix)
        self.num_created += 1
        if self.foreign is not None and not isinstance(fmt, NMFormat):
            return FoundLinearMethod(fmt, prefix, self.note_choice)
        return SparseLinearMethod(fmt, prefix, self.note_choice)

    def note_choice(
        self, backend: Backend | None, reasons: Sequence[str], stored: Stored | None
    ) -> None:
        """Called for every prepared linear; the last one writes the log lines of the model.

        Args:
            backend: None for a linear that is not worth packing.
            reasons: why better backends refused.
            stored: how its weight is packed.
        """
        self._chosen.append((backend, reasons))
        if stored is not None:
            self._held.append(stored)
        if len(self._chosen) < self.num_created:
            return
        _show_logs()
        packed = [(backend, reasons) for backend, reasons in self._chosen if backend is not None]
        kernels.log_choice(packed)
        if num_dense := len(self._chosen) - len(packed):
            logger.info("gblm: %d linears have too few zeros to be packed: dense", num_dense)
        backends = Counter(backend.name for backend, _ in packed)
        metrics.report(self.reports, backends, self._held)
        self._chosen.clear()
        self._held.clear()

    def _head_method(self, prefix: str) -> QuantizeMethodBase:
        fmt = self._stored(prefix)
        if fmt is None:
            return HeadMethod(prefix)
        if fmt.name != "dense":
            raise CheckpointError(
                f"{prefix}: vLLM serves an output head in the format dense, not {fmt.name}."
            )
        self.num_created += 1
        return PackedHeadMethod(fmt, prefix, self.note_choice)

    def _stored(self, module: str) -> Format | None:
        source = self.manifest or self.foreign
        if source is None:
            raise CheckpointError("vLLM did not say which folder it loads.")
        return source.format_of(module)

    def _format_of(self, prefix: str) -> Format | None:
        """The format of a layer; the parts of a fused one (q/k/v, gate/up) must go together."""
        parent, _, name = prefix.rpartition(".")
        pieces = self.packed_modules_mapping.get(name, [name])
        found = [self._stored(f"{parent}.{piece}") for piece in pieces]
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
    """vLLM shows its own loggers only; once they are set up, ours speaks through them, too."""
    ours = logging.getLogger("gblm")
    if not ours.handlers:
        for handler in logging.getLogger("vllm").handlers:
            ours.addHandler(handler)
        ours.setLevel(logging.INFO)
