"""Recipe: every input of one pruning run, and the choice for each linear that follows from it.

A recipe comes from JSON and goes there; unknown keys are errors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from gblm.errors import UsageError
from gblm.files import read_json
from gblm.sparse.formats import Format, format_for, join_formats
from gblm.sparse.formats.manifest import MAX_GROUPS
from gblm.sparse.patterns import Pattern, parse
from gblm.sparse.values import FLOAT, ValueType, parse_values

DType = Literal["auto", "float32", "bfloat16", "float16"]
HeadValues = Literal["float", "int8", "int4"]
# Last parts of the names of linears with the same input, which servers multiply as one.
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class Calibration(BaseModel):
    """The text that statistics and gradients are taken on.

    Attributes:
        source: a .txt, .jsonl or .parquet file, a named set of `gblm.data.NAMED_SETS`, or several
            with shares; see `gblm.calibrate.text.parse_mix`.
        num_samples: number of windows.
        seq_len: tokens per window; never taken from the model's maximum.
        seed: of the window positions.
        bos: windows begin with what the tokenizer puts before a prompt, as a server's prompts do;
            the papers' code leaves it out.
        batch_size: windows per forward pass; 1 is the papers' order of summation.
        prefix: whose activations a decoder layer sees: "pruned", the pruned layers' before it as in
            the papers; "dense", the unchanged model's, at one forward pass less.
        order: within a decoder layer: "layer", all linears are observed before one is pruned, as in
            the papers; "sequential", each linear sees what the pruned ones before it make of the
            text, in one forward pass instead of two, with all samples in one batch.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str = "pydoc"
    num_samples: int = Field(default=128, ge=1)
    seq_len: int = Field(default=2048, ge=2)
    seed: int = 0
    bos: bool = True
    batch_size: int = Field(default=1, ge=1)
    prefix: Literal["pruned", "dense"] = "pruned"
    order: Literal["layer", "sequential"] = "layer"

    @property
    def num_batches(self) -> int:
        """The forward passes that ranks can share; samples, where all of a rank's are one batch."""
        if self.order == "sequential":
            return self.num_samples
        return -(-self.num_samples // self.batch_size)

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Calibration:
        if self.order == "sequential" and self.prefix == "dense":
            raise ValueError("order sequential has no dense prefix")
        if self.order == "sequential" and self.batch_size > 1:
            raise ValueError("order sequential takes all samples at once: leave batch_size out")
        return self


class LayerChoice(BaseModel):
    """A LayerChoice is an exception to a recipe's pattern and values, for some linears.

    Attributes:
        targets: glob patterns of module names, as in `Recipe.targets`.
        pattern: as in Recipe; None is the recipe's own.
        values: as in Recipe; None is the recipe's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    targets: tuple[str, ...] = Field(min_length=1)
    pattern: str | None = None
    values: str | None = None


class Refitting(BaseModel):
    """Least squares on the weights that stay; see `gblm.methods.refit`.

    Attributes:
        iterations: of conjugate gradients.
        damping: fraction of the Hessian's mean diagonal that is added to the diagonal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    iterations: int = Field(default=12, ge=1, le=1000)
    damping: float = Field(default=0.01, gt=0, le=1)


class Reconstruction(BaseModel):
    """Training each pruned decoder layer towards the dense one; see `gblm.calibrate.reconstruct`.

    Attributes:
        epochs: passes over the calibration samples.
        learning_rate: relative to the size (root mean square) of what is trained, at its highest,
            after a tenth of the steps; it falls linearly to 0.
        batch_size: samples per step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=0.004, gt=0, lt=1)
    batch_size: int = Field(default=4, ge=1)


class Recovering(BaseModel):
    """Training the whole pruned model towards the dense one; see `gblm.recover`.

    Attributes:
        text: sources and their shares; see `gblm.calibrate.text.parse_mix`.
        held_out: sources on whose held-out parts KL is measured before and after.
        tokens: to train on; they are taken once.
        minutes: take as many of the tokens as the machine trains on in this time, by an estimate.
        seq_len: tokens per window.
        batch_size: windows per step.
        seed: of the windows and their order.
        bos: windows begin with what the tokenizer puts before a prompt.
        train: "weights", all kept values; "scales", norms and factors of rows and columns, or of
            groups of codes, at almost no memory; "auto", weights where the machine can hold them.
        learning_rate: relative to the size (root mean square) of a weight's values, at its highest;
            norms and factors take multiples of it.
        dtype: of the computation; "auto" is the checkpoint's own.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str = "pydoc:1,self:2"
    held_out: tuple[str, ...] = Field(default=("pydoc", "self"), min_length=1)
    tokens: int = Field(default=65536, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    seq_len: int = Field(default=256, ge=2)
    batch_size: int = Field(default=4, ge=1)
    seed: int = 0
    bos: bool = True
    train: Literal["auto", "weights", "scales"] = "auto"
    learning_rate: float = Field(default=1.5e-3, gt=0)
    dtype: DType = "auto"


class Recipe(BaseModel):
    """One pruning run.

    Attributes:
        model: a local HF folder or a hub id.
        method: a name of `gblm.methods.METHODS`.
        pattern: "2:4", "0.5", …; see `gblm.sparse.patterns.parse`.
        values: of the packed weights: "float", the checkpoint's own dtype; "int8", "int4", rounded
            to codes with a scale per group of columns: "int8:128", "int4:row"; see
            `gblm.sparse.values.parse_values`.
        layers: exceptions to `pattern` and `values`; the first that matches a linear decides.
        head: of the output head: "float", as it is; "int8", "int4", rounded to codes. Of a head
            that is tied to the embeddings a rounded copy is stored, and the embeddings stay.
        rounding: how weights become codes: "nearest"; "mse", with scales that make the error least;
            "obs", so that the weights not yet rounded make up for it (with the pattern "dense" this
            is GPTQ). Codes only.
        refit: least squares on the weights that stay; None leaves them as the method does.
        reconstruct: train each decoder layer once it is pruned; None does not.
        recover: train the whole model once it is pruned; None does not.
        options: the method's own fields, such as {"alpha": 100.0}; unknown ones are refused.
        calibration: None for methods that need no data, and with `stats`.
        stats: a folder of saved statistics, used instead of calibration text.
        targets: glob patterns of module names to prune; all linears of the decoder layers if empty.
        ignore: glob patterns of module names that stay dense; wins over `targets`.
        dtype: of the computation. "auto" is the checkpoint's own. Stored values keep the
            checkpoint's dtype.
        device: a torch device.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    method: str = "gblm"
    pattern: str = "2:4"
    values: str = "float"
    layers: tuple[LayerChoice, ...] = ()
    head: HeadValues = "float"
    rounding: Literal["nearest", "mse", "obs"] = "nearest"
    refit: Refitting | None = None
    reconstruct: Reconstruction | None = None
    recover: Recovering | None = None
    options: dict[str, bool | float | int | str] = Field(default_factory=dict)
    calibration: Calibration | None = Calibration()
    stats: str | None = None
    targets: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    dtype: DType = "auto"
    device: str = "cpu"

    @property
    def patterns(self) -> tuple[str, ...]:
        """Every pattern that it names, its own first."""
        return tuple(dict.fromkeys([self.pattern, *(x.pattern for x in self.layers if x.pattern)]))

    @model_validator(mode="after")
    def _steps_fit(self) -> Recipe:
        kinds = {self.values, *(choice.values or self.values for choice in self.layers)}
        if self.rounding != "nearest" and kinds == {"float"}:
            raise ValueError(
                f"rounding {self.rounding} goes with codes: give values int8 or int4, or leave "
                "rounding out"
            )
        if self.reconstruct is not None and self.stats is not None:
            raise ValueError(
                "reconstruct runs text through the model, which stats cannot stand for: leave one "
                "of the two out"
            )
        if self.reconstruct is not None and self.calibration is None:
            raise ValueError("reconstruct needs calibration text")
        if self.reconstruct and self.calibration and self.calibration.prefix == "dense":
            raise ValueError(
                "reconstruct trains on what the pruned layers before make of the text: leave "
                "prefix dense out"
            )
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types."""
        return self.model_dump(mode="json")

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Recipe:
        """Check the fields and build a recipe.

        Raises:
            UsageError: a field is unknown or has a value that is not allowed.
        """
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f"{part}: " for part in [".".join(map(str, first["loc"]))] if part)
            message = first["msg"].removeprefix("Value error, ")
            raise UsageError(f"recipe: {where}{message}.") from error

    @classmethod
    def from_file(cls, path: Path) -> Recipe:
        """Read a recipe.json, such as the one inside every packed checkpoint."""
        return cls.from_dict(read_json(path))


@dataclass(frozen=True)
class Choice:
    """What one linear is pruned to.

    Attributes:
        pattern: which positions may stay.
        values: how they are stored, `resolve`d for the linear's columns.
    """

    pattern: Pattern
    values: ValueType = FLOAT

    @property
    def fmt(self) -> Format:
        """The format that stores it."""
        return format_for(self.pattern, self.values)


def choose(recipe: Recipe, linears: Mapping[str, nn.Linear]) -> dict[str, Choice]:
    """Settle the pattern and the value type of every linear to prune.

    Args:
        recipe: its `layers` decide, the first that matches; else its own pattern and values.
        linears: to prune, by full name, in order.

    Returns:
        A choice for each of them, in the same order.

    Raises:
        PatternError: a pattern or value type is unknown, or columns do not divide into groups.
        UsageError: an entry of `layers` has no effect, or parts of a fused linear do not go
            together.
    """
    _check_globs(recipe.layers, linears)
    own = LayerChoice(targets=("*",))
    decided: set[LayerChoice] = set()
    chosen = {}
    for name, linear in linears.items():
        layer = next((layer for layer in recipe.layers if matches(name, layer.targets)), own)
        decided.add(layer)
        values = parse_values(layer.values or recipe.values)
        pattern = parse(layer.pattern or recipe.pattern)
        chosen[name] = Choice(pattern, values.resolve(name, linear.in_features))
    for layer in recipe.layers:
        if layer not in decided:
            raise UsageError(
                f"recipe: layers {', '.join(layer.targets)!r} come after others that match the "
                "same linears, and have no effect. The first that matches decides."
            )
    _check_fused(chosen)
    _check_count(chosen)
    return chosen


def patterns_of(choices: Mapping[str, Choice]) -> list[Pattern]:
    """List each pattern once, in order."""
    return list(dict.fromkeys(choice.pattern for choice in choices.values()))


def matches(name: str, globs: Iterable[str]) -> bool:
    """Tell whether a glob matches the full name of a module, or the end of it after a dot."""
    return any(fnmatchcase(name, glob) or fnmatchcase(name, f"*.{glob}") for glob in globs)


def _check_globs(layers: Iterable[LayerChoice], names: Iterable[str]) -> None:
    every = list(names)
    for glob in (glob for layer in layers for glob in layer.targets):
        if not any(matches(name, (glob,)) for name in every):
            raise UsageError(
                f"recipe: layers {glob!r} matches no linear that is pruned; the first one is "
                f"{every[0]}."
            )


def _check_fused(choices: Mapping[str, Choice]) -> None:
    """Refuse what vLLM could not serve; a part that stays unpruned is told of when it is served."""
    for name in choices:
        parent, _, last = name.rpartition(".")
        for parts in (parts for parts in FUSED if parts[0] == last):
            found = {part: choices.get(f"{parent}.{part}") for part in parts}
            formats = {part: choice.fmt for part, choice in found.items() if choice}
            if join_formats(formats.values()) is None:
                ways = ", ".join(f"{part} {fmt.spec}" for part, fmt in formats.items())
                raise UsageError(
                    f"recipe: {parent}: {ways} are one linear when they are served, and must "
                    "have the same format and values. Sparsities alone may differ."
                )


def _check_count(choices: Mapping[str, Choice]) -> None:
    """Refuse more ways than the manifest has groups for, one of them for the head."""
    count = len(set(choices.values()))
    if count >= MAX_GROUPS:
        raise UsageError(
            f"recipe: layers ask for {count} different patterns and values; a packed model has at "
            f"most {MAX_GROUPS - 1}."
        )
