"""The cases of frontier.py: what is done to the model, and how it is called in tables.

Sparsities of int4 are those whose counted bits stay under the budget. On SmolLM2's shapes a weight
of density d costs 1 bit of mask, 4·d of codes, 0.10 of row offsets and padding, and 0.16 of scales
with groups as `auto` finds them (96 of 576 columns, 128 of 1536), 0.08 with groups of 192, 0.02
with a scale a row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gblm.recipe import Recipe

SAMPLES = (16, 64)
SEQ_LEN = 256
# Bits of a code and its largest value. No packed value type has them: they are stored as int4.
NARROW = {3: 3, 2: 1}


@dataclass(frozen=True)
class Case:
    """A case is one way to make the model smaller.

    Attributes:
        label: its name in tables.
        recipe: fields of Recipe that are not the default ones; empty leaves the model as it is.
        narrow: bits of a code that is stored as int4 but counted, and limited, like this; see
            NARROW. 0 for what the recipe says.
        budget: spread over the linears by measured sensitivity, in place of the recipe's pattern;
            see gblm.search. Empty for the recipe's own.
    """

    label: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    narrow: int = 0
    budget: str = ""

    @property
    def calibrated(self) -> bool:
        """Tell whether the result depends on calibration text."""
        data_free = self.recipe.get("method") == "magnitude" and "reconstruct" not in self.recipe
        return bool(self.recipe) and (not data_free or self.recipe.get("rounding") == "obs")

    def build(self, model: str, source: str, samples: int, seed: int) -> Recipe:
        """Make the whole recipe of one run."""
        calibration = {"source": source, "num_samples": samples, "seq_len": SEQ_LEN, "seed": seed,
                       "order": "sequential"}  # fmt: skip
        own = {"calibration": calibration if self.calibrated else None}
        return Recipe.from_dict({"model": model, "dtype": "float32", **own, **self.recipe})


def _dense(values: str, **steps: Any) -> dict[str, Any]:
    return {"method": "magnitude", "pattern": "dense", "values": values, **steps}


def _sparse(method: str, pattern: str, values: str = "float", **steps: Any) -> dict[str, Any]:
    rounding = {} if values == "float" else {"values": values, "rounding": "obs"}
    return {"method": method, "pattern": pattern, **rounding, **steps}


OBS: dict[str, Any] = {"rounding": "obs"}
REC: dict[str, Any] = {"reconstruct": {"epochs": 2}}

CASES = {
    # Not pruned.
    "dense": Case("dense bf16"),
    "int8": Case("int8", _dense("int8")),
    "int4-rtn": Case("int4, to the nearest", _dense("int4")),
    "int4-gptq": Case("int4, GPTQ", _dense("int4", **OBS)),
    "int3-gptq": Case("int3, GPTQ", _dense("int4", **OBS), 3),
    "int3-gptq-rec": Case("int3, GPTQ + reconstruct", _dense("int4", **OBS, **REC), 3),
    "int2-gptq": Case("int2, GPTQ", _dense("int4", **OBS), 2),
    "int2-g32-rec": Case("int2 g32, GPTQ + reconstruct", _dense("int4:32", **OBS, **REC), 2),
    "sparsegpt-24": Case("2:4, SparseGPT", _sparse("sparsegpt", "2:4")),
    "alps-24-rec": Case("2:4, ALPS + reconstruct", _sparse("alps", "2:4", **REC)),
    "alps-24-rec4": Case(
        "2:4, ALPS + reconstruct 4", _sparse("alps", "2:4", reconstruct={"epochs": 4})
    ),
    "int4-3.1-rec": Case(
        "int4 52.1 %, joint + reconstruct", _sparse("sparsegpt", "0.521", "int4:192", **REC)
    ),
    "int4-3.1-spread-rec": Case(
        "int4 spread to 3.1 bits, joint + reconstruct",
        _sparse("sparsegpt", "0.521", "int4:192", **REC),
        budget="3.1bits",
    ),
    "int4-2.6-rec": Case(
        "int4 64.6 %, joint + reconstruct", _sparse("sparsegpt", "0.646", "int4:192", **REC)
    ),
    "int4-2.6-spread-rec": Case(
        "int4 spread to 2.6 bits, joint + reconstruct",
        _sparse("sparsegpt", "0.646", "int4:192", **REC),
        budget="2.6bits",
    ),
}
