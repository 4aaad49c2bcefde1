"""Recipe: every input of one pruning run.

A recipe comes from JSON and goes there; unknown keys are errors. What a field means stands beside
it, once: options of the command line take type, bounds, default and help from here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gblm.cache import recall
from gblm.errors import UsageError
from gblm.files import read_json

DType = Literal["auto", "float32", "bfloat16", "float16"]
# Last parts of the names of linears with the same input, which servers multiply as one.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
# Text of a known domain and twice as much that the dense model writes: docs/log.md.
MIX = "pydoc:1,self:2"
# A file is held in memory until it is written.
SHARD_SIZE = "2GB"


class Fields(BaseModel):
    """Frozen fields, of which unknown ones are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Check the fields and build one.

        Raises:
            UsageError: a field is unknown or has a value that is not allowed.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
            message = first["msg"].removeprefix("Value error, ")
            raise UsageError(f"{cls.__name__.lower()}: {where}{message}.") from error


class Calibration(Fields):
    """The text that statistics and gradients are taken on."""

    source: str = Field(
        default="pydoc",
        description="A .txt, .jsonl or .parquet file, or pydoc, wikitext2, c4; several with "
        "shares: pydoc:1,self:2, where self is what the dense model writes.",
    )
    num_samples: int = Field(default=128, ge=1, description="Windows of the text.")
    # Never taken from the model's maximum.
    seq_len: int = Field(default=2048, ge=2, description="Tokens per window.")
    seed: int = Field(
        default=0, ge=0, lt=1 << 31, description="Of the windows' places in the text."
    )
    bos: bool = Field(
        default=True,
        description="Begin windows with what the tokenizer puts before a prompt, as a server's "
        "prompts do; the papers leave it out.",
    )
    order: Literal["layer", "sequential"] = Field(
        default="layer",
        description="Observe a whole decoder layer before pruning it, as in the papers, or linear "
        "by linear in one pass, with all windows in one batch.",
    )
    shrinkage: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share to take off the Hessian's correlations between inputs, which small "
        "samples overstate; the papers take none.",
    )


class LayerChoice(Fields):
    """A LayerChoice is an exception to a recipe's pattern and values, for some linears.

    `targets` are globs like `ignore`; a pattern or values that are None are the recipe's own.
    """

    targets: tuple[str, ...] = Field(min_length=1)
    pattern: str | None = None
    values: str | None = None


class Refitting(Fields):
    """The weights that stay move to the least squares; see `gblm.methods.refit`."""

    iterations: int = Field(default=12, ge=1, le=1000, description="Of conjugate gradients.")
    damping: float = Field(
        default=0.01, gt=0, le=1, description="Share of the Hessian's mean diagonal to add to it."
    )


class Reconstruction(Fields):
    """Each pruned layer is trained towards the dense one; see `gblm.calibrate.reconstruct`."""

    epochs: int = Field(default=1, ge=1, description="Passes over the calibration samples.")
    learning_rate: float = Field(
        default=0.004,
        gt=0,
        lt=1,
        description="Relative to the size (root mean square) of what is trained, at its highest, "
        "after a tenth of the steps; it falls linearly to 0.",
    )
    batch_size: int = Field(default=4, ge=1, description="Samples per step.")


class Recovering(Fields):
    """The whole pruned model is trained towards the dense one; see `gblm.recover`."""

    tokens: int = Field(default=65536, ge=1, description="Tokens to train on, each once.")
    minutes: float | None = Field(
        default=None,
        gt=0,
        description="Take as many of the tokens as the machine trains on in this time, by an "
        "estimate.",
    )
    text: str = Field(
        default=MIX,
        description="Sources and their shares: files, pydoc, wikitext2, c4, and self, what the "
        "dense model writes.",
    )
    held_out: tuple[str, ...] = Field(
        default=("pydoc", "self"),
        min_length=1,
        description="Text to measure KL on, before and after; again for each domain.",
    )
    train: Literal["auto", "weights", "scales"] = Field(
        default="auto",
        description="All kept values; or norms and factors of rows, columns and groups of codes "
        "only, at almost no memory; auto takes weights where the machine can hold them.",
    )
    learning_rate: float = Field(
        default=7e-4,
        gt=0,
        description="Of a weight's values, relative to their size (root mean square), at its "
        "highest; norms and factors take multiples of it.",
    )
    seq_len: int = Field(default=256, ge=2, description="Tokens per window.")
    batch_size: int = Field(default=4, ge=1, description="Windows per step.")
    seed: int = Field(default=0, ge=0, lt=1 << 31, description="Of the windows and their order.")
    bos: bool = Field(default=True, description="Begin windows as prompts do.")


class Recipe(Fields):
    """One pruning run: a model, and all that is done to it."""

    model: str = Field(description="A local HF folder or a hub id.")
    method: str = Field(default="gblm", description="One of {}.")
    pattern: str = Field(
        default="2:4",
        description="2:4, 4:8, 8:16, any N:M (N kept of M), dense, or a sparsity such as 0.5 "
        "(with a budget: unstructured).",
    )
    values: str = Field(
        default="float",
        description="How kept weights are stored: {}. Codes take a group size: int8:128, "
        "int4:row; int4 alone is int4:auto, the largest of 128, 96, 64, 32 columns that divides "
        "the linear's.",
    )
    layers: tuple[LayerChoice, ...] = Field(
        default=(), description="Exceptions; the first that matches a linear decides."
    )
    dense_ends: int = Field(
        default=0,
        ge=0,
        description="First and last decoder layers, so many of each, that are rounded but not "
        "pruned, which they bear worst; at most a quarter of all layers.",
    )
    head: Literal["float", "int8", "int4"] = Field(
        default="float",
        description="How the output head is stored: as it is, or rounded to codes, which take the "
        "place of embeddings that are tied to it, too. int4 has groups of 32 columns.",
    )
    rounding: Literal["nearest", "obs"] = Field(
        default="nearest",
        description="How integer codes are found: to the nearest, or so that the weights not yet "
        "rounded make up for it (GPTQ; joint with sparsegpt's mask).",
    )
    refit: Refitting | None = None
    reconstruct: Reconstruction | None = None
    recover: Recovering | None = None
    options: dict[str, bool | float | int | str] = Field(
        default_factory=dict, description="The method's own fields, such as alpha."
    )
    calibration: Calibration | None = Calibration()
    ignore: tuple[str, ...] = Field(
        default=(),
        description="Glob of module names, or of their ends, to leave dense; repeatable.",
    )
    max_shard_size: str = Field(
        default=SHARD_SIZE, description="Of a file of weights, such as 500MB or 5GB."
    )
    dtype: DType = Field(
        default="auto",
        description="Of the computation; auto is the checkpoint's, or float32 where the CPU "
        "multiplies that faster. Stored values keep the checkpoint's.",
    )
    device: str = Field(default="cpu", description="cpu, cuda, cuda:N")

    @model_validator(mode="after")
    def _steps_fit(self) -> Recipe:
        kinds = {self.values, *(choice.values or self.values for choice in self.layers), self.head}
        if self.rounding != "nearest" and kinds == {"float"}:
            raise ValueError(
                f"rounding {self.rounding} goes with codes: give values int8 or int4, or leave "
                "rounding out"
            )
        if self.reconstruct is not None and self.calibration is None:
            raise ValueError("reconstruct needs calibration text")
        shard_bytes(self.max_shard_size)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return self.model_dump(mode="json")

    @classmethod
    def from_file(cls, path: Path) -> Recipe:
        """Read a recipe.json, such as the one inside every packed checkpoint."""
        return cls.from_dict(read_recipe(path))


def shard_bytes(size: str) -> int:
    """Read a size as transformers writes it, such as "5GB" or "1.5MB".

    Raises:
        UsageError: it is none.
    """
    found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,6})?)\s*([KMGT])B", size.strip().upper())
    count = int(float(found[1]) * 1000 ** (1 + "KMGT".index(found[2]))) if found else 0
    if not count:
        raise UsageError(f"max shard size {size!r}: give a number and KB, MB, GB or TB: 5GB.")
    return count


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe.json; in a folder that this machine made, with its paths as they were here."""
    found, kept = read_json(path), recall(path.parent)
    return kept if published(kept) == found else found


def published(recipe: dict[str, Any]) -> dict[str, Any]:
    """Give a recipe as others may read it: names of local folders and files, but not their places.

    Args:
        recipe: with an absolute path or a hub id for its model.
    """
    shown = dict(recipe)
    if Path(recipe.get("model", "")).is_absolute():
        shown["model"] = Path(recipe["model"]).name
    for step, *keys in (("calibration", "source"), ("recover", "text", "held_out")):
        if fields := recipe.get(step):
            shown[step] = fields | {key: _names(fields[key]) for key in keys}
    return shown


def _names(text: Any) -> Any:
    """Leave out the folders of the files in a mix of texts, or in a list of texts."""
    if isinstance(text, str):
        return ",".join(Path(one).name for one in text.split(","))
    return [_names(one) for one in text]


def matches(name: str, globs: Iterable[str]) -> bool:
    """Tell whether a glob matches the full name of a module, or the end of it after a dot."""
    return any(fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}") for glob in globs)
