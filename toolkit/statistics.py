"""Where a run's statistics come from: its calibration text, or a folder that another run saved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gblm import data
from gblm.calibrate.activations import place
from gblm.calibrate.gradients import Gradients, gradient_norms, num_steps, resident_fits
from gblm.calibrate.saved import LayerStats, StatsFolder
from gblm.calibrate.stats import STATS
from gblm.calibrate.walk import Walk
from gblm.layers import StreamedLayers
from gblm.methods.pipeline import Pipeline
from gblm.model import hidden_size, load_tokenizer
from gblm.progress import Progress
from gblm.ranks import Ranks
from gblm.recipe import Calibration, Recipe

logger = logging.getLogger(__name__)
GRADIENTS = frozenset({"grad_norm"})


@dataclass(frozen=True)
class Statistics:
    """What one run knows about its model besides the weights.

    Attributes:
        recipe: of the run.
        pipeline: what it needs.
        layers: the model.
        names: full names of the linears to prune.
        ranks: the processes that share the samples.
        windows: calibration token ids [samples, tokens], or None.
        saved: statistics that another run saved; no forward pass is run then.
        model_sha256: identifies the model's files.
    """

    recipe: Recipe
    pipeline: Pipeline
    layers: StreamedLayers
    names: frozenset[str]
    ranks: Ranks
    windows: Tensor | None
    saved: StatsFolder | None
    model_sha256: str

    @classmethod
    def prepare(
        cls,
        recipe: Recipe,
        pipeline: Pipeline,
        layers: StreamedLayers,
        names: frozenset[str],
        ranks: Ranks,
        sha256: str,
    ) -> Statistics:
        """Draw the calibration windows, or check the saved statistics.

        Args:
            recipe: of the run; without calibration text where none is to be run.
            pipeline: made from it.
            layers: the model.
            names: full names of the linears to prune.
            ranks: the processes that share the samples.
            sha256: of the model's files.

        Raises:
            InputError: the saved statistics are of another model.
            UsageError: there is too little text, or statistics lack something.
        """
        windows = saved = None
        if pipeline.needs and recipe.stats is not None:
            saved = StatsFolder(Path(recipe.stats))
            saved.check(sha256, len(layers), names, pipeline.needs, pipeline.gradient_norm)
            if (prefix := saved.facts().get("prefix")) != "dense":
                logger.warning("the statistics were taken behind layers pruned by %s", prefix)
        elif recipe.calibration is not None:
            windows = _draw(recipe.calibration, layers.reader.folder)
        return cls(recipe, pipeline, layers, names, ranks, windows, saved, sha256)

    @property
    def calibration_sha256(self) -> str | None:
        """Of the token ids that the statistics were taken on."""
        if self.saved is not None:
            found: str | None = self.saved.facts().get("calibration_sha256")
            return found
        return data.fingerprint(self.windows) if self.windows is not None else None

    def batches(self) -> list[Tensor]:
        """This rank's token ids, each [samples, tokens]."""
        if self.windows is None or self.recipe.calibration is None:
            return []
        calibration = self.recipe.calibration
        if calibration.order == "sequential":
            own = self.ranks.share(list(self.windows))
            return [torch.stack(own)] if own else []
        return self.ranks.share(self.windows.split(calibration.batch_size))

    def walk(self, scratch: Path, first: int) -> Walk:
        """How to walk over the decoder layers, of which `first` are finished."""
        calibration, keep_dense = self.recipe.calibration, self.recipe.reconstruct is not None
        return Walk(
            needs=frozenset(STATS) & self.pipeline.needs if self.saved is None else frozenset(),
            first=first,
            prefix=calibration.prefix if calibration else "pruned",
            order=calibration.order if calibration else "layer",
            scratch=place(scratch, self._activation_bytes() * (2 if keep_dense else 1)),
            ranks=self.ranks,
            keep_dense=keep_dense,
        )

    def make_gradients(self, folder: StatsFolder, scratch: Path, progress: Progress) -> None:
        """Fill the folder with gradient norms of the dense model; rank 0 writes.

        Args:
            folder: to write to.
            scratch: for the inputs of all decoder layers, if memory is short.
            progress: for a progress bar.
        """
        if self.windows is None:
            return
        samples = self.ranks.share(list(self.windows))
        resident = self.ranks.agree(int(self._resident())) == 1
        steps = num_steps(self.layers, len(samples), resident)
        how = Gradients(
            norm=self.pipeline.gradient_norm or "l2",
            names=self.names,
            scratch=place(scratch, self._activation_bytes() * (len(self.layers) + 2)),
            ranks=self.ranks,
            resident=resident,
            on_step=progress("gradients", steps),
        )
        for index, norms in gradient_norms(self.layers, samples, how):
            prefix = self.layers.name(index) + "."
            if self.ranks.leads:
                own = {n.removeprefix(prefix): {"grad_norm": t} for n, t in norms.items()}
                folder.write(index, own)
        if self.ranks.leads:
            folder.finish(self.facts(GRADIENTS))

    def stored(self, gradients: StatsFolder) -> Callable[[int], LayerStats]:
        """What the walk does not collect itself, by decoder layer."""
        if self.saved is not None:
            return partial(_read, self.saved, self.pipeline.needs)
        if "grad_norm" in self.pipeline.needs:
            return partial(_read, gradients, GRADIENTS)
        return lambda index: {}

    def facts(self, needs: frozenset[str]) -> dict[str, Any]:
        """What stands in stats.json."""
        pruned = self.recipe.calibration is None or self.recipe.calibration.prefix == "pruned"
        return {
            "model": self.model_sha256,
            "linears": sorted(self.names),
            "needs": sorted(needs),
            "gradient_norm": self.pipeline.gradient_norm,
            "num_samples": len(self.windows) if self.windows is not None else 0,
            "calibration_sha256": self.calibration_sha256,
            "prefix": _prefix(self.recipe) if pruned else "dense",
            "order": self.recipe.calibration.order if self.recipe.calibration else "layer",
        }

    def _resident(self) -> bool:
        """Whether there is room for all layers, and a sum per weight, at once."""
        model, prefix = self.layers.model, self.layers.prefix
        count = sum(p.numel() for n, p in model.named_parameters() if n.startswith(prefix))
        weights = sum(model.get_submodule(name).weight.numel() for name in self.names)
        return resident_fits(count, weights, self.layers.dtype, self.layers.device)

    def _activation_bytes(self) -> int:
        """Of this rank's samples at the input of one decoder layer."""
        tokens = sum(batch.numel() for batch in self.batches())
        return tokens * hidden_size(self.layers.model) * self.layers.dtype.itemsize


def _prefix(recipe: Recipe) -> str:
    """What the layers in front were made by, in words."""
    steps = [name for name in ("refit", "reconstruct") if getattr(recipe, name) is not None]
    return ", ".join([f"{recipe.method} {', '.join(recipe.patterns)}", *steps])


def _read(folder: StatsFolder, wanted: frozenset[str], index: int) -> LayerStats:
    stats = folder.read(index, wanted)
    if "grad_norm" not in wanted:
        return stats
    # The method's formula may divide by it; see GBLM's mode "mean".
    samples = torch.tensor(float(folder.facts()["num_samples"]))
    return {local: own | {"num_samples": samples} for local, own in stats.items()}


def _draw(wanted: Calibration, folder: Path) -> Tensor:
    documents = data.read_documents(wanted.source, "calibration")
    return data.calibration_windows(
        documents,
        load_tokenizer(folder),
        wanted.num_samples,
        wanted.seq_len,
        wanted.seed,
        wanted.bos,
    )
