from __future__ import annotations

import pytest

from gblm.bench.serving import METRICS, summarise


def run(number: int, side: str, value: float) -> dict[str, float | str | int]:
    names = (*METRICS, "decode_tok_s", "memory_mb", "ready_s")
    return {"round": number, "side": side} | dict.fromkeys(names, value)


def test_ratios_are_paired_by_round_not_by_order() -> None:
    runs = [run(0, "baseline", 10), run(0, "model", 20),
            run(1, "model", 80), run(1, "baseline", 20),
            run(2, "baseline", 40), run(2, "model", 40)]  # fmt: skip
    row = summarise(runs, {"model": 50, "baseline": 100})["tpot_ms"]
    assert (row["model"], row["baseline"]) == (40, 20)
    assert (row["ratio_min"], row["ratio"], row["ratio_max"]) == (1, 2, 4)


def test_size_stands_beside_speed() -> None:
    runs = [run(0, "baseline", 1), run(0, "model", 1)]
    assert summarise(runs, {"model": 65, "baseline": 100})["weights_mb"]["ratio"] == pytest.approx(
        0.65
    )
