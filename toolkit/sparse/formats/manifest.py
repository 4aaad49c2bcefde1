"""Manifest: what config.json says about the packed weights, under "quantization_config".

Hosts (transformers, vLLM) look there and dispatch on "quant_method". Everything in it comes from
a file and is checked before it is believed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gblm.errors import CheckpointError
from gblm.sparse.formats import Format, make_format

QUANT_METHOD = "gblm"
VERSION = 1
MAX_GROUPS = 1024
TARGET = re.compile(r"[A-Za-z0-9_.*-]{1,200}")


class Group(BaseModel):
    """A Group names linears that are stored alike.

    Attributes:
        format: a name of FORMATS.
        pattern: as `gblm.sparse.patterns.parse` reads it.
        values: as `gblm.sparse.values.parse_values` reads it; not written when it is "float".
        targets: module names; `*` matches any run of characters.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    pattern: str
    values: str = "float"
    targets: tuple[str, ...] = Field(min_length=1)


class Manifest(BaseModel):
    """The packed weights of one checkpoint; modules that no group names are dense.

    Attributes:
        groups: the first that names a module decides.
        tied: by the name of the embeddings that are not stored, the packed output head whose rows
            they are.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    quant_method: Literal["gblm"] = "gblm"
    version: int = VERSION
    groups: tuple[Group, ...] = Field(min_length=1, max_length=MAX_GROUPS)
    tied: dict[str, str] = Field(default={}, max_length=1)

    @classmethod
    def from_config(cls, fields: Any) -> Manifest:
        """Read the "quantization_config" object of a config.json.

        Raises:
            CheckpointError: not ours, of another version, malformed, or with unknown names.
        """
        if not isinstance(fields, dict) or fields.get("quant_method") != QUANT_METHOD:
            raise CheckpointError(
                'config.json holds no packed weights of gblm ("quant_method": "gblm").'
            )
        if fields.get("version") != VERSION:
            raise CheckpointError(
                f"manifest version {fields.get('version')!r} is not supported: this gblm reads "
                f"version {VERSION}. Update gblm-toolkit, or pack the model again."
            )
        try:
            manifest = cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"])
            raise CheckpointError(f"manifest: {where}: {first['msg']}.") from error
        for group in manifest.groups:
            make_format(group.format, group.pattern, group.values)
            for target in group.targets:
                if not TARGET.fullmatch(target):
                    raise CheckpointError(f"manifest: target {target[:80]!r} is no module name.")
        for embeddings, head in manifest.tied.items():
            fmt = manifest.format_of(head)
            codes = fmt is not None and fmt.name == "dense" and not fmt.values.is_float
            if not codes or manifest.format_of(embeddings) is not None:
                raise CheckpointError(
                    f"manifest: {embeddings[:80]!r} is tied to {head[:80]!r}: of the two the "
                    "second must be packed, and no other, in dense codes."
                )
        return manifest

    def to_config(self) -> dict[str, Any]:
        """Make the JSON object for config.json; float groups read as before there were others."""
        fields = self.model_dump(mode="json")
        for group in fields["groups"]:
            if group["values"] == "float":
                del group["values"]
        if not self.tied:
            del fields["tied"]
        return fields

    def renamed(self, rename: Callable[[str], str | None]) -> Manifest:
        """Return the manifest of a host that calls tensors otherwise.

        Args:
            rename: gives the host's name of a tensor.
        """
        groups = (
            group.model_copy(
                update={"targets": tuple(_renamed(target, rename) for target in group.targets)}
            )
            for group in self.groups
        )
        tied = {_renamed(one, rename): _renamed(head, rename) for one, head in self.tied.items()}
        return Manifest(groups=tuple(groups), tied=tied)

    def format_of(self, module: str) -> Format | None:
        """Find the format of a module's weight; None when it is stored dense."""
        first = self._in_full.get(module, len(self.groups))
        globs = (index for index, glob in self._globs if fnmatchcase(module, glob))
        first = min(first, next(globs, first))
        if first == len(self.groups):
            return None
        group = self.groups[first]
        return make_format(group.format, group.pattern, group.values)

    @cached_property
    def _in_full(self) -> dict[str, int]:
        """Map modules that are named in full to their first group; there may be hundreds."""
        pairs = [(name, i) for i, group in enumerate(self.groups) for name in group.targets]
        return {name: index for name, index in reversed(pairs) if "*" not in name}

    @cached_property
    def _globs(self) -> list[tuple[int, str]]:
        """List every other target behind its group, in order."""
        pairs = [(i, name) for i, group in enumerate(self.groups) for name in group.targets]
        return [(index, name) for index, name in pairs if "*" in name]


def _renamed(target: str, rename: Callable[[str], str | None]) -> str:
    """Rename a module by what a tensor of it would be called."""
    return (rename(f"{target}.weight") or target).removesuffix(".weight")


def group_targets(modules: Iterable[str], all_modules: Iterable[str]) -> tuple[str, ...]:
    """Shorten module names: a name that all layers, or all experts, have gets `*` for its number.

    Args:
        modules: the names to match.
        all_modules: every linear of the decoder layers; the targets match none of the others.
    """
    chosen = dict.fromkeys(modules)
    members: dict[str, set[str]] = {}
    for name in all_modules:
        for star in _starred(name):
            members.setdefault(star, set()).add(name)
    fitting = {star for star, names in members.items() if names <= chosen.keys()}
    return tuple(
        dict.fromkeys(
            next((star for star in _starred(name) if star in fitting), name) for name in chosen
        )
    )


def _starred(name: str) -> tuple[str, ...]:
    """Give the globs of a name, the widest first: for all layers and experts, or one of the two."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts[:-1]) if part.isdigit()]
    starred = (
        ("*" if index in chosen else part for index, part in enumerate(parts))
        for chosen in (numbers, numbers[:1], numbers[1:])
    )
    return tuple(map(".".join, starred))
