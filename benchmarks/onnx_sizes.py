"""Size of ONNX files with packed weights against the packed folders they are made of: SmolLM2-135M.

    python benchmarks/onnx_sizes.py [--model FOLDER]

Rows are those of onnx_speed.py. Writes benchmarks/results/onnx-sizes.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from matrix import gblm
from onnx_speed import CASES
from pages import RESULTS, made_by, origin, table

from gblm.fetch import fetch
from gblm.model.folder import read_config
from gblm.provenance import provenance

RECORD = RESULTS / "onnx-sizes.json"


def measure(model: Path) -> list[dict[str, Any]]:
    """Bytes of tensors in both, for each case that is packed."""
    rows, config = [], read_config(model)
    embeddings = 2 * config["vocab_size"] * config["hidden_size"]
    for name, command, pattern, values, head, _ in CASES:
        if not command:
            continue
        with tempfile.TemporaryDirectory() as work:
            packed, graph = Path(work) / "packed", Path(work) / "onnx"
            made = command.format(model=model, pattern=pattern, values=values, head=head)
            gblm(f"{made} --output {packed}")
            gblm(f"export onnx {packed} --sparse --validate 0 --output {graph}")
            rows.append({
                "name": name, "pattern": pattern, "values": values, "head": head,
                # A graph stores a head that is tied to the embeddings apart; so do integer heads.
                "tied_bytes": embeddings if head == "float" else 0,
                "packed_bytes": sum(p.stat().st_size for p in packed.glob("*.safetensors")),
                "onnx_bytes": sum(p.stat().st_size for p in graph.glob("model.onnx*")),
            })  # fmt: skip
    return rows


def sizes() -> str:
    """The table of docs/onnx.md."""
    if not RECORD.exists():
        return "Nothing has been recorded yet."
    record = json.loads(RECORD.read_text())
    rows = [
        [
            row["name"],
            f"{row['packed_bytes'] / 1e6:.1f}",
            f"{row['tied_bytes'] / 1e6:.1f}",
            f"{row['onnx_bytes'] / 1e6:.1f}",
            f"{row['onnx_bytes'] / (row['packed_bytes'] + row['tied_bytes']) - 1:+.1%}",
        ]
        for row in record["rows"]
    ]
    header = ["SmolLM2-135M", "packed folder, MB", "tied head, MB", "ONNX files, MB", "difference"]
    return f"{table(header, rows)}\n\n{origin(record, 'torch', 'onnxruntime')}"


def main() -> None:
    """Make, measure, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="SmolLM2-135M as a folder, if not fetched")
    given = parser.parse_args()
    record: dict[str, Any] = {
        "kind": "onnx sizes",
        "command": made_by(),
        "provenance": provenance(),
    }
    record["rows"] = measure(given.model or fetch("smollm2"))
    RECORD.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
