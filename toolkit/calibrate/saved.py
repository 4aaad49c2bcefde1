"""Statistics on disk: one safetensors file per decoder layer, and stats.json that says what of.

One pass over the calibration text can serve several recipes. The folder counts as complete once
stats.json is there.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gblm.errors import InputError, MachineError, UsageError
from gblm.files import flush, flush_folder, read_json, write_json, write_tensors

FACTS = "stats.json"
VERSION = 1
LayerStats = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class StatsFolder:
    """Statistics of every decoder layer, by local name of the linear."""

    path: Path

    @property
    def complete(self) -> bool:
        """Tells whether every layer is there."""
        return (self.path / FACTS).exists()

    def write(self, index: int, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Store one decoder layer; linears that share a tensor share it in the file, too."""
        self.path.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        names: dict[str, dict[str, str]] = {}
        key_of: dict[int, str] = {}
        for local, own in stats.items():
            for stat, tensor in own.items():
                key = key_of.setdefault(id(tensor), f"{local}:{stat}")
                tensors[key] = tensor.cpu()
                names.setdefault(local, {})[stat] = key
        write_tensors(self._file(index), tensors, {"names": json.dumps(names)})

    def read(self, index: int, wanted: frozenset[str]) -> LayerStats:
        """Read one decoder layer; linears whose tensors are all the same share a dict.

        Args:
            index: of the decoder layer.
            wanted: names of statistics.

        Raises:
            InputError: the file is missing or damaged.
        """
        path = self._file(index)
        try:
            with safe_open(path, framework="pt") as file:
                names: dict[str, dict[str, str]] = json.loads((file.metadata() or {})["names"])
                keys = {own[stat] for own in names.values() for stat in wanted if stat in own}
                tensors = {key: file.get_tensor(key).clone() for key in keys}
            shared: dict[tuple[str, ...], dict[str, Tensor]] = {}
            for own in names.values():
                found = {stat: tensors[own[stat]] for stat in sorted(wanted) if stat in own}
                shared.setdefault(_keys(own, wanted), found)
            return {local: shared[_keys(own, wanted)] for local, own in names.items()}
        except (OSError, SafetensorError, KeyError, ValueError, AttributeError) as error:
            raise InputError(
                f"{path} holds no statistics ({error}). Collect them again."
            ) from error

    def finish(self, facts: dict[str, Any]) -> None:
        """Say what was collected; the folder is complete from now on."""
        write_json(self.path / FACTS, {"version": VERSION, **facts})

    def publish(self, target: Path) -> None:
        """Move the folder, on another disk or not; it appears under its new name complete."""
        if target.exists():
            shutil.rmtree(self.path, ignore_errors=True)
            return
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        try:
            shutil.copytree(self.path, partial, dirs_exist_ok=True)
            flush_folder(partial)
            partial.rename(target)
            flush(target.parent)
        except OSError as error:
            raise MachineError(f"writing {target} failed: {error}.") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(self.path)

    def facts(self) -> dict[str, Any]:
        """Return what was collected.

        Raises:
            InputError: this is no complete folder of statistics.
        """
        if not self.complete:
            raise InputError(
                f"{self.path} holds no statistics: {FACTS} is missing. Make them with --save-stats."
            )
        facts = read_json(self.path / FACTS)
        if facts.get("version") != VERSION:
            raise InputError(
                f"{self.path}: statistics of version {facts.get('version')!r}; this gblm reads "
                f"version {VERSION}. Collect them again."
            )
        return facts

    def check(
        self,
        model: str | None,
        layers: int,
        names: frozenset[str],
        needs: frozenset[str],
        norm: str | None,
    ) -> None:
        """Refuse statistics of another model, or without what a run needs.

        Args:
            model: fingerprint of the model to prune; None leaves it unchecked.
            layers: its number of decoder layers.
            names: full names of the linears to prune.
            needs: names of statistics.
            norm: of the gradients, if they are needed.

        Raises:
            InputError: they belong to another model, or are incomplete.
            UsageError: they lack something that the method needs.
        """
        facts = self.facts()
        if model is not None and facts.get("model") != model:
            raise InputError(f"{self.path} holds statistics of another model.")
        if lacking := sorted(needs - set(facts.get("needs", ()))):
            raise UsageError(f"{self.path} lacks {', '.join(lacking)}: collect again without it.")
        if norm is not None and facts.get("gradient_norm") != norm:
            raise UsageError(
                f"{self.path} holds {facts.get('gradient_norm')} gradient norms, the method asks "
                f"for {norm}: pass --gradient-norm {facts.get('gradient_norm')}."
            )
        if others := sorted(names - set(facts.get("linears", ()))):
            raise UsageError(
                f"{self.path} holds nothing of {others[0]}: collect without --targets."
            )
        if not isinstance(facts.get("num_samples"), int) or facts["num_samples"] < 1:
            raise InputError(f"{self.path}: {FACTS} names no samples. Collect them again.")
        for index in range(layers):
            if not self._file(index).exists():
                raise InputError(f"{self._file(index)} is missing. Collect the statistics again.")

    def _file(self, index: int) -> Path:
        return self.path / f"layer-{index:05d}.safetensors"


def _keys(own: dict[str, str], wanted: frozenset[str]) -> tuple[str, ...]:
    return tuple(own[stat] for stat in sorted(wanted) if stat in own)
