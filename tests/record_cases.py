"""Records as `gblm eval` and `gblm bench` write them, with made-up figures."""

from __future__ import annotations

from collections.abc import Mapping

from gblm.record import Record, Row, Verdict

PYDOC = "pydoc, held-out text as one stream, 19 windows × 512 tokens, no overlap, sha256 ab"
PROVENANCE = {"device": "a CPU", "machine": {"cores": 2}, "packages": {"torch": "2.13"}}


def quality_record(
    perplexities: Mapping[str, float], load: str = PYDOC, command: str = "gblm eval half"
) -> Record:
    """The last one is the baseline."""
    sides = {side: {"engine": "hf", "dtype": "bfloat16", "bytes": 10**6 * (index + 1)}
             for index, side in enumerate(perplexities)}  # fmt: skip
    rows = [Row(side, load, "perplexity", "", value) for side, value in perplexities.items()]
    rows.append(Row(next(iter(sides)), load, "drift_mean", "nats", 0.125))
    return Record("eval", sides, tuple(rows), list(sides)[-1], provenance=PROVENANCE,
                  command=command)  # fmt: skip


def speed_record(
    tpot: Mapping[str, float], loads: tuple[str, ...] = ("64 + 32 tokens",), reason: str = ""
) -> Record:
    """The first one is the baseline; a load takes longer than the one before."""
    rows = []
    for width, load in enumerate(loads, 1):
        for side, ms in tpot.items():
            rounds = [ms * width * scale for scale in (0.95, 1.0, 1.05)]
            rows += [
                Row.of_rounds(side, load, "tpot_ms_p50", "ms", rounds),
                Row.of_rounds(side, load, "output_tok_s", "tok/s", [1e3 / one for one in rounds]),
            ]
    return Record("bench", {side: {"engine": "vllm"} for side in tpot}, tuple(rows),
                  next(iter(tpot)), Verdict(not reason, (reason,) if reason else ()),
                  provenance=PROVENANCE, command="gblm bench dense half")  # fmt: skip
