"""`gblm report`: what it takes from records and folders, what it refuses, what it writes."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome
from record_cases import PYDOC, quality_record, speed_record

from gblm.errors import InputError, MachineError
from gblm.record import Record, Row
from gblm.report import figures
from gblm.report.page import html
from gblm.report.sources import Sources, read_sources
from gblm.report.tables import cell, number, record_tables


def shown(*records: Record) -> Sources:
    return Sources([(f"{number}.json", record) for number, record in enumerate(records)])


def test_models_of_one_name_are_joined_and_protocols_are_kept_apart() -> None:
    records = [
        quality_record({"half": 27.5, "smol": 13.75}),
        quality_record({"half": 31.0, "smol": 15.0}, load="other text, 9 windows"),
        speed_record({"smol": 20.0, "half": 10.0}),
    ]
    found = [(figure.title, figure.note) for figure in figures.frontiers(records)]
    assert found == [
        ("Perplexity against MB of all tensors", f"{PYDOC}; MB of all tensors"),
        ("Perplexity against MB of all tensors", "other text, 9 windows; MB of all tensors"),
        ("Perplexity against tpot_ms_p50", f"{PYDOC}; tpot_ms_p50, 64 + 32 tokens"),
        ("Perplexity against tpot_ms_p50", "other text, 9 windows; tpot_ms_p50, 64 + 32 tokens"),
    ]
    # One point is no chart.
    assert not list(figures.frontiers([quality_record({"half": 27.5})]))
    assert not list(figures.frontiers([quality_record({"half": 27.5, "smol": float("inf")})]))


def test_what_eval_writes_is_shown(
    gblm: Callable[..., Outcome], packed: Path, tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ("--text", text_file, "--seq-len", 32, "--max-windows", 2)
    gates = ("--gate", "ppl <= 1000000", "--gate", "top1 >= 1")
    words = (*words, *gates, "--output", "record.json")
    assert gblm("eval", packed, "--baseline", tiny, *words).code == 5
    record = Record.read(tmp_path / "record.json")
    sources = read_sources([tmp_path / "record.json"])
    assert sources.records == [("record.json", record)]
    kl = record.value(packed.name, record.loads[0], "kl_mean")
    assert kl is not None
    page = html(sources, "x")
    assert "gate passed: ppl" in page
    assert "gate failed: top1" in page
    assert number(kl, 4) in page
    assert "gblm eval" in page


def test_a_figure_stands_with_its_interval_and_its_ratio() -> None:
    rows = (Row("a", "arc", "acc", "share", 0.5, (), (0.375, 0.625)),
            Row("b", "arc", "acc", "share", 0.25), Row("b", "arc", "lost", "", None))  # fmt: skip
    record = Record("eval", {"a": {}, "b": {}}, rows, "b")
    assert cell(record, "a", "arc", "acc") == "0.5 [0.375, 0.625] (2)"
    assert cell(record, "b", "arc", "acc") == "0.25"
    assert cell(record, "b", "arc", "lost") == "not finite"
    assert cell(record, "a", "arc", "lost") == "–"


def test_one_metric_under_many_loads_is_one_table() -> None:
    rows = tuple(Row("2:4", f"8×16, {n} tokens", "us", "µs", float(n)) for n in (1, 2, 4))
    record = Record("kernels", {"2:4": {"backend": "cpu"}}, rows)
    sides, one = record_tables(record)
    assert sides.rows == (("2:4", "cpu"),)
    assert (one.title, one.header) == ("us, µs", ("", "2:4"))
    assert one.rows[2] == ("8×16, 4 tokens", "4")


def test_many_sides_stand_below_each_other_beside_their_controls() -> None:
    sides = {f"s{n}": {"control": "s0" if n else None} for n in range(7)}
    rows = [Row.of_rounds(side, "8x8, 1 token", metric, "", [2.0 + n, 2.0 + 2 * n])
            for n, side in enumerate(sides) for metric in ("us", "gb_s")]  # fmt: skip
    _, one = record_tables(Record("kernels", sides, tuple(rows), "s1"))
    assert one.header == ("", "us", "gb_s", "us, times its control")
    assert one.rows[0] == ("s0", "2 (0.583 [0.5, 0.667])", "2 (0.583 [0.5, 0.667])", "–")
    assert one.rows[1] == ("s1", "3.5", "3.5", "1.75 [1.5, 2]")
    assert len(one.rows) == 7


def test_only_the_metrics_that_are_asked_for_are_shown() -> None:
    record = speed_record({"dense": 20.0, "half": 10.0}, loads=("1", "4"))
    _, one = record_tables(record, ["tpot_ms_p50"])
    assert (one.title, one.header) == ("tpot_ms_p50, ms", ("", "dense", "half"))
    assert one.rows[0] == ("1", "20", "10 (0.5 [0.5, 0.5])")


def test_ratios_over_rounds_are_drawn() -> None:
    record = speed_record({"dense": 20.0, "half": 10.0}, loads=("1", "4", "16"))
    found = [(figure.title, figure.note) for figure in figures.ratios(record)]
    assert found == [("Ratio to the baseline", load) for load in ("1", "4", "16")]


def test_an_invalid_record_says_why() -> None:
    sources = shown(speed_record({"dense": 20.0, "half": 10.0}, reason="7 preemptions"))
    page = html(sources, "x")
    assert "INVALID" in page
    assert "0.json: 7 preemptions" in page


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>&{{7*7}}$x_1$ -->'


def test_words_of_a_record_stay_words() -> None:
    load = f"{HOSTILE}, 8 windows"
    quality = quality_record({HOSTILE: 27.5, "half": 9.0}, load=load, command=HOSTILE)
    speed = speed_record({HOSTILE: 20.0, "half": 10.0}, loads=("1", HOSTILE, "3"), reason=HOSTILE)
    sources = shown(quality, speed)
    page = html(sources, HOSTILE)
    assert page.count("<svg") == 7
    assert "{{7*7}}" in page
    for sign in ("<script", "<img", "<!--"):
        assert sign not in page, sign


def test_the_page_loads_and_runs_nothing() -> None:
    page = html(shown(quality_record({"half": 27.5, "smol": 13.75})), "x")
    assert "<svg" in page
    # Names of SVG's own vocabulary, which nothing loads.
    page = page.replace('xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    for sign in ("<script", "http:", "https:", "@import", '<link rel="stylesheet'):
        assert sign not in page, sign
    assert set(re.findall(r"url\((.)", page)) <= {"#"}


def test_folders_show_their_sparsity(pack_tiny: Callable[..., Path]) -> None:
    sources = read_sources([pack_tiny(pattern="0.5")])
    (folder,) = sources.folders
    assert len(folder.sparsity) == 14
    assert set(folder.sparsity.values()) == {0.5}
    page = html(sources, "x")
    assert "pruned with wanda" in page
    assert "<image" in page
    assert page.count("<svg") == 1
    assert folder.table.rows[0][:3] == ("0.5", "bfloat16", "14")


def test_folders_that_are_none_or_alike_are_refused(
    pack_tiny: Callable[..., Path], tiny: Path
) -> None:
    with pytest.raises(InputError, match="is no packed folder"):
        read_sources([tiny])
    with pytest.raises(InputError, match="two folders are called"):
        read_sources([pack_tiny(), pack_tiny()])


def test_a_damaged_mask_is_refused(packed: Path) -> None:
    shard = next(packed.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    start = header["model.layers.0.mlp.up_proj.bitmask"]["data_offsets"][0] + 8 + length
    data[start] = 255
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"up_proj\.bitmask: row 0"):
        read_sources([packed])


def test_without_matplotlib_one_sentence_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sources = shown(quality_record({"half": 27.5, "smol": 13.75}))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MachineError, match=r"pip install 'gblm-toolkit\[report\]'"):
        html(sources, "x")


def test_numbers_are_read_by_people() -> None:
    found = [number(v) for v in (0.0, 1.0, 12.345, 1234.5, 0.012345, 2.5e7, float("inf"))]
    assert found == ["0", "1", "12.3", "1234", "0.0123", "2.5e+07", "∞"]


def test_the_command_writes_the_page_and_needs_a_place_for_it(
    gblm: Callable[..., Outcome], pack_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    quality_record({"half": 27.5, "smol": 13.75}).write(tmp_path / "a.json")
    done = gblm("--json", "report", "a.json", pack_tiny(), "--output", "r/x.html")
    assert done.code == 0, done
    assert json.loads(done.out) == {"output": "r/x.html", "records": 1, "folders": 1}
    page = (tmp_path / "r/x.html").read_text()
    assert "<svg" in page
    assert "27.5 (2)" in page
    refused = gblm("report", "a.json")
    assert refused.code == 2
    assert "--output" in refused.err
    refused = gblm("report", "a.json", "--output", "a.json/x.html")
    assert refused.code == 2
    assert "no folder that can be written to" in refused.err
