"""The README's tables and the figure of docs/results.md, from other scripts' records."""

from __future__ import annotations

import io
import math

import decoding
import pages
import recovery
import rivals
from decoding import BASELINE, LOADS, row_name
from recovery import DENSE, side_name

from gblm.record import Record

# Models, and the tokens that theirs are recovered on.
MODELS = {"smollm2": 65536, "gemma3-270m": 32768}
# Sides of the rivals, which are rows of the speeds.
RIVALS = ("llama.cpp Q8_0", "llama.cpp Q4_0")
# Random weights, so speed alone; and what stands beside our sparse row.
LARGER = ("tinyllama", "olmoe7b")
LOOPS = ("llama.cpp Q4_0", "ik_llama.cpp Q4_0")
CONTROL, OURS = row_name("dense", "int4"), row_name("8:16", "int4")
TEXTS = ("descriptions", "WikiText-2", "pydoc")


def sides(tokens: int) -> list[tuple[str, str, str]]:
    """Give the rows of a model: label, row of the speeds, and side of the recovery."""
    budget, dense = ("8:16@3.7bits", "int4", 1, tokens), ("dense", "int4", 1, tokens)
    return [
        ("dense bf16 (vLLM)", BASELINE, DENSE),
        ("dense int4, recovered", row_name("dense", "int4"), side_name(*dense, head="int4")),
        (
            "int4 8:16 or dense, 3.7 bits, recovered: `gblm prune`",
            row_name("3.7bits", "int4"),
            side_name(*budget, head="int4"),
        ),
    ]


def speeds_of(model: str) -> Record:
    """Read a model's record of decoding.py with one thread."""
    return Record.read(pages.RESULTS / f"decoding-{model}-1.json")


def table() -> str:
    """Give for each model a row of vLLM's bf16, then ours, all its speeds of the same rounds."""
    speeds = {model: speeds_of(model) for model in MODELS}
    header = ["model", "MB", *TEXTS, *(f"{work}, tok/s (× bf16, × dense)" for work in LOADS)]
    rows, made, seeds = [], [speed.as_json() for speed in speeds.values()], []
    for model, tokens in MODELS.items():
        quality, of_model = Record.read(recovery.record_of(model)), sides(tokens)
        rows += [
            [
                f"{pages.MODELS[model]}: {label}",
                f"{quality.sides[side]['bytes'] / 1e6:.0f}",
                *(pages.perplexity(quality.value(side, text, "perplexity") or 0) for text in TEXTS),
                *(decoding.cell(speeds[model], name, work) for work in LOADS),
            ]
            for label, name, side in of_model
        ]  # fmt: skip
        recovered = [side for *_, side in of_model]
        made += recovery.made(quality, recovered)
        seeds.append(f"{pages.MODELS[model]}: {recovery.seeds(quality, recovered)}")
    rounds = " and ".join(decoding.num_rounds(speed) for speed in speeds.values())
    return (
        f"{pages.table(header, rows)}\n\nPerplexity of three texts, 16 windows × 256 tokens: of "
        "*descriptions* and WikiText-2 no step has seen anything, of pydoc they have seen another "
        "part; in PyTorch, without the [rounding of activations](docs/log.md"
        "#2026-12-02-what-rounded-activations-cost) of the kernels. "
        f"{'; '.join(seeds)}. vLLM on CPU, compiled, one thread, {rounds} interleaved rounds; "
        "the first ratio is to bf16, the second to the dense integers of the same value type. "
        "The head, which is the embeddings, too, is rounded like the linears. "
        f"{pages.origins(made, 'torch')}"
    )


def larger() -> str:
    """Give one sequence's speed on larger shapes: vLLM, llama.cpp, ours without zeros and with."""
    records = {pages.MODELS[name]: speeds_of(name) for name in LARGER}
    rows = []
    for shape, record in records.items():
        found = {side: decoding.speed(record, side, "decode 1")
                 for side in (BASELINE, *LOOPS, CONTROL, OURS)}  # fmt: skip
        own, bases = found[OURS] or 0, (max(found[x] or 0 for x in LOOPS), found[CONTROL] or 0)
        cells = [f"{value:.1f}" if value else "–" for value in found.values()]
        rows.append([shape, *cells, *(f"{own / base:.2f}" for base in bases)])
    header = ["decode 1, tok/s", *found, "× the faster llama.cpp", f"× {CONTROL}"]
    made = [record.as_json() for record in records.values()]
    return (
        f"{pages.table(header, rows)}\n\nRandom weights, so speed alone; one thread, interleaved "
        "rounds. OLMoE's bf16 found no room beside the others; llama.cpp and ik_llama.cpp run its "
        f"weights as a Qwen3-MoE. {pages.origins(made, 'torch')}"
    )


def figure() -> str:
    """Draw what SmolLM2 loses for its bytes and its time, and recoveries over tokens, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams["svg.hashsalt"] = "gblm"
    drawn = Figure(figsize=(16, 5), layout="constrained")
    frontier, times, curves = drawn.subplots(1, 3)
    recovery.draw(frontier, curves)
    speed = speeds_of("smollm2")
    ours, others = Record.read(recovery.record_of("smollm2")), Record.read(rivals.RECORD)
    shown = [(label, name, ours, side) for label, name, side in sides(MODELS["smollm2"])]
    int8 = ("dense", "int8")
    shown.append(("dense int8, GPTQ", row_name(*int8), ours, side_name(*int8)))
    shown += [(name, name, others, name) for name in RIVALS]
    for label, name, quality, side in shown:
        took = 1e3 / (decoding.speed(speed, name, "decode 1") or math.nan)
        times.plot(took, quality.value(side, TEXTS[0], "perplexity"), "o", label=label)
    times.set(xlabel="ms a token, one sequence", ylabel=f"perplexity of {TEXTS[0]}")
    times.legend(fontsize="x-small")
    for axes in (frontier, curves):
        axes.set_ylim(bottom=0)
    written = io.StringIO()
    drawn.savefig(written, format="svg", metadata={"Date": None})
    return written.getvalue()
