"""What a packed folder says of itself: sparsity_report.json, and the model card.

The output head stands beside the pruned weights: sparsity and bits per weight are theirs alone.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData, metadata_load
from yaml import YAMLError

from gblm.sparse.formats import Format, Parts, Shape

# What one line of text has room for.
MAX_NAMED = 4


def weight_row(
    name: str, fmt: Format, shape: Shape, dtype: torch.dtype, zeros: int, parts: Parts
) -> dict[str, Any]:
    """Describe one packed weight.

    Args:
        name: of the linear.
        fmt: its format.
        shape: [out, in].
        dtype: of the dense weight.
        zeros: how many of the weights are zero.
        parts: as packed.
    """
    count, size = shape[0] * shape[1], sum(t.numel() * t.element_size() for t in parts.values())
    return {
        "name": name,
        "shape": list(shape),
        "format": fmt.name,
        "pattern": str(fmt.pattern),
        **({} if fmt.values.is_float else {"values": str(fmt.values)}),
        "dtype": str(dtype).removeprefix("torch."),
        "zeros": zeros,
        "sparsity": round(zeros / count, 6),
        "bytes_dense": count * dtype.itemsize,
        "bytes_packed": size,
        "bits_per_weight": round(8 * size / count, 4),
    }


def summary(
    rows: list[dict[str, Any]], head: dict[str, Any] | None, dense: int, packed: int
) -> dict[str, Any]:
    """Make the whole report.

    Args:
        rows: of the pruned linears.
        head: of the output head, when it is packed.
        dense: bytes of all tensors of the source.
        packed: bytes of all tensors of the packed folder.
    """
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        way = {key: row[key] for key in ("format", "pattern", "values") if key in row}
        alike.setdefault(tuple(way.values()), []).append(row)
    return {
        **_totals(rows),
        "bytes_dense": dense,
        "bytes_packed": packed,
        "groups": [_group(own) for own in alike.values()],
        **({"head": head} if head else {}),
        "tensors": rows,
    }


def in_words(report: dict[str, Any]) -> str:
    """Say the patterns and value types of a report, such as "2:4, 0.5 int4:128"."""
    ways = [" ".join([g["pattern"], g.get("values", "")]).strip() for g in report["groups"]]
    if len(ways) > MAX_NAMED:
        return f"{len(ways)} patterns and value types"
    return ", ".join(ways)


def _group(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up linears that are stored alike."""
    way = {key: rows[0][key] for key in ("format", "pattern", "values") if key in rows[0]}
    return way | _totals(rows)


def _totals(rows: list[dict[str, Any]]) -> dict[str, Any]:
    weights = sum(row["shape"][0] * row["shape"][1] for row in rows)
    return {
        "linears": len(rows),
        "sparsity": round(sum(row["zeros"] for row in rows) / weights, 6),
        "bits_per_weight": round(8 * sum(row["bytes_packed"] for row in rows) / weights, 4),
    }


DENSE = "dense"
# What a model on a hub can be called; folders may be called anything.
HUB_NAME = re.compile(r"([\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
LICENCE = ("license", "license_name", "license_link")
CARD = """\
---
{facts}
---
# {base}: {ways}

{linears} linears, {sparsity:.1%} of their weights zero, stored packed with
{bits:.2f} bits per weight including masks, codes and scales.
Tensors: {packed:.1f} MB packed, {dense:.1f} MB dense. {quality}

## Use

```
pip install gblm-toolkit
gblm serve .        # vLLM's OpenAI server, weights packed
```

```python
import gblm.packed
model = gblm.packed.load(".")
```

## How it was made

N:M = N weights kept of M. Every weight stands in `sparsity_report.json`; `gblm inspect . --verify`
checks `MANIFEST.json`. This is `recipe.json`, which `gblm prune --recipe` repeats:

```json
{recipe}
```
"""


def model_card(recipe: dict[str, Any], report: dict[str, Any], licence: dict[str, Any]) -> str:
    """Write the model card: Markdown with a metadata header for model hubs."""
    facts = ModelCardData(
        base_model=recipe["model"] if HUB_NAME.fullmatch(recipe["model"]) else None,
        base_model_relation="quantized",
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*_tags(report["groups"], recipe["method"]), "gblm", "vllm"],
        **licence,
    )
    return CARD.format(
        facts=facts.to_yaml(),
        base=recipe["model"],
        ways=in_words(report),
        linears=report["linears"],
        sparsity=report["sparsity"],
        bits=report["bits_per_weight"],
        packed=report["bytes_packed"] / 1e6,
        dense=report["bytes_dense"] / 1e6,
        quality=_quality(report.get("recover")),
        recipe=json.dumps(recipe, indent=2, ensure_ascii=False),
    )


def licence_of(folder: Path) -> dict[str, Any]:
    """Find what a model's card says of its licence; where it has none, whether a licence is there.

    Returns:
        Fields for the header of another card.
    """
    card = folder / "README.md"
    try:
        found = metadata_load(card) if card.is_file() else None
    except (OSError, ValueError, YAMLError):
        found = None
    if found and isinstance(found.get("license"), str):
        return {key: value for key in LICENCE if isinstance(value := found.get(key), str)}
    file = next((path.name for path in sorted(folder.glob("LICENSE*")) if path.is_file()), None)
    return {"license": "other", "license_link": file} if file else {}


def _tags(groups: list[dict[str, Any]], method: str) -> list[str]:
    patterns = list(dict.fromkeys(group["pattern"] for group in groups))
    specs = (group["values"] for group in groups if "values" in group)
    kinds = list(dict.fromkeys(spec.partition(":")[0] for spec in specs))
    bits = [f"{kind.removeprefix('int')}-bit" for kind in kinds]
    if patterns == [DENSE]:
        return [*kinds, *bits]
    return ["sparse", "pruned", *patterns[:MAX_NAMED], *kinds, *bits, method]


def _quality(recovered: dict[str, Any] | None) -> str:
    if recovered is None:
        return (
            "Its quality was not measured when this card was written: run "
            "`gblm eval . --baseline DENSE`."
        )
    texts = (
        f"{name} {recovered['before'][name]['kl']:.3f} → {after['kl']:.3f}"
        for name, after in recovered["after"].items()
    )
    return (
        f"KL to the dense model on held-out text, nats, before and after recovery: "
        f"{', '.join(texts)}. More: `gblm eval . --baseline DENSE`."
    )
