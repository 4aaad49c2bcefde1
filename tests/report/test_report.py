"""`gblm report`: what it takes from records and folders, what it refuses, what it writes."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Outcome
from record_cases import PERPLEXITY, models_record, onnx_record, perplexity_record

from gblm.bench.requests import Request, Slo, metrics_of
from gblm.cli import cli
from gblm.errors import GateError, InputError
from gblm.report import figures, pictures
from gblm.report.axes import Axis, number
from gblm.report.markdown import markdown
from gblm.report.page import html
from gblm.report.sources import READERS, Sources, read_sources
from gblm.report.tables import measured


def write(folder: Path, name: str, record: dict) -> Path:
    path = folder / name
    path.write_text(json.dumps(record))
    return path


def test_models_of_one_name_are_joined_and_protocols_are_kept_apart(tmp_path: Path) -> None:
    paths = [
        write(tmp_path, "a.json", perplexity_record("half", 27.5)),
        write(
            tmp_path, "b.json", perplexity_record("half", 31.0, protocol="other text, 9 windows")
        ),
        write(tmp_path, "c.json", onnx_record({"smol": 20.0, "half": 10.0})),
    ]
    facts = read_sources(paths, []).facts
    found = list(figures.quality_and_speed(facts))
    assert [figure.rows[-1] for figure in found] == [("half", "10", "27.5"), ("half", "10", "31")]
    assert "other text" in found[1].note
    assert "other text" not in found[0].note


def test_what_eval_writes_is_read(
    gblm: Callable[..., Outcome], packed: Path, tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    words = ("--text", text_file, "--seq-len", 32, "--max-windows", 2)
    gates = ("--gate", "ppl <= 1000000", "--gate", "top1 >= 1")
    words = (*words, *gates, "--output", "record.json")
    assert gblm("eval", packed, "--baseline", tiny, *words).code == 5
    record = json.loads((tmp_path / "record.json").read_text())
    sources = read_sources([tmp_path / "record.json"], [])
    ours, dense = sources.facts.quality
    assert (ours.name, dense.name) == (packed.name, tiny.name)
    assert (ours.perplexity, ours.ratio) == (record["perplexity"], record["ratio"])
    assert dense.perplexity == record["perplexity_baseline"]
    assert ours.num_bytes == record["size"]["bytes"]
    assert dense.num_bytes == record["size_baseline"]["bytes"] > ours.num_bytes
    assert ours.bits is not None
    (drift,) = sources.facts.drifts
    assert (drift.name, drift.beside) == (packed.name, tiny.name)
    assert drift.figures[4] == record["texts"][0]["drift"]["kl_mean"]
    assert [check.passed for check in sources.facts.checks] == [True, False]
    page = html(sources, "x")
    assert f"<td>{number(drift.figures[3])}</td>" in page
    assert "<td>FAIL</td>" in page
    assert "| FAIL |" in markdown(sources, "x")


def test_scores_of_tasks_stand_with_their_errors_beside_the_baseline(tmp_path: Path) -> None:
    row = {"value": 0.5, "stderr": 0.125, "baseline": 0.75, "baseline_stderr": None}
    tasks = {"protocol": "lm-eval, 0-shot", "results": {"arc": {"acc": row}}}
    record = {"kind": "evaluation", "model": "a/half", "baseline": "b/dense", "texts": [],
              "tasks": tasks}  # fmt: skip
    sources = read_sources([write(tmp_path, "a.json", record)], [])
    page = html(sources, "x")
    assert '<th scope="col">half</th><th scope="col">dense</th>' in page
    assert "<td>arc</td><td>acc</td><td>0.5000 ± 0.1250</td><td>0.7500</td>" in page
    assert "lm-eval, 0-shot" in page
    front = yaml.safe_load(markdown(sources, "x").split("---")[1])["model-index"]
    (result,) = next(entry["results"] for entry in front if entry["name"] == "half")
    assert result["dataset"]["name"] == "arc"
    assert result["metrics"] == [{"type": "acc", "value": 0.5, "name": "acc (lm-eval, 0-shot)"}]


def test_what_search_keeps_is_read(tmp_path: Path) -> None:
    base = {"perplexity": 20.0, "protocol": "text", "tokens_sha256": "ab"}
    int4 = {"perplexity": 25.0, "ratio": 1.25, "bits_per_weight": 4.5, "bytes": 9}
    state = {"kind": "search", "baseline": base, "measured": {"int4": int4}}
    shown = {"kind": "search", "baseline": base, "candidates": [{"name": "int4", "measured": int4}]}
    for record in (state, shown):
        found = read_sources([write(tmp_path, "search.json", record)], []).facts.quality
        assert [(row.name, row.perplexity, row.bits) for row in found] == [
            ("unpruned", 20.0, None), ("int4", 25.0, 4.5),
        ]  # fmt: skip


def watch_record() -> dict:
    quantiles = {"p50": {"value": 0.2}, "p90": {"value": 0.4}, "p99": None}
    row = {"a": quantiles, "b": quantiles, "ratio": 2.0, "low": 1.6, "high": 2.5}
    metrics = {key: row for key in ("ttft", "tpot", "itl", "e2e", "throughput")}
    return {
        "kind": "bench watch", "a": "http://one:1/metrics", "b": "http://two:2/metrics",
        "window": {"duration": 600.0, "interval": 10.0, "intervals": 60, "valid": 59},
        "metrics": metrics, "caveats": ["few tokens"], "problems": ["A restarted"],
    }  # fmt: skip


def test_live_servers_are_shown_as_ratios_of_times(tmp_path: Path) -> None:
    sources = read_sources([write(tmp_path, "w.json", watch_record())], [])
    ratios = {ratio.metric: ratio for ratio in sources.facts.ratios}
    # Twice as fast is half the time, from 1/2.5 to 1/1.6.
    assert (ratios["TTFT"].median, ratios["TTFT"].low, ratios["TTFT"].high) == (0.5, 0.4, 0.625)
    assert ratios["generated_tok_s"].median == 2.0
    assert ratios["TTFT"].name == "http://two:2"
    curve = sources.facts.curves[0]
    assert curve.points == ((50.0, 200.0), (90.0, 400.0))
    for text in (html(sources, "x"), markdown(sources, "x")):
        assert "few tokens" in text
        assert "A restarted" in text


def test_an_exported_folder_shows_its_validation(tmp_path: Path) -> None:
    folder = tmp_path / "half-onnx"
    folder.mkdir()
    found = {
        "tokens": 8, "reference": "torch float32", "max_logit_difference_over_std": float("inf"),
        "top1_agreement": 0.99, "passed": False,
        "tolerance": {"max_logit_difference_over_std": 0.01, "top1_agreement": 0.98},
    }  # fmt: skip
    report = {"source": "x/half", "target": "cpu", "precision": "fp32", "sparse": True}
    write(folder, "onnx_report.json", report | {"validation": found})
    sources = read_sources([folder], [0])
    assert [(check.name, check.passed) for check in sources.facts.checks] == [
        ("half-onnx", False), ("half-onnx", True),
    ]  # fmt: skip
    assert "<td>FAIL</td><td>∞</td><td>≤ 0.01</td>" in html(sources, "x")
    write(folder, "onnx_report.json", report)
    assert "exported without validation" in html(read_sources([folder], [0]), "x")


@pytest.mark.parametrize("passes", [True, False])
def test_an_export_says_by_which_command_it_was_made_also_when_it_failed(
    passes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = {"kind": "onnx export", "source": "x/half", "target": "cpu", "precision": "fp32",
              "sparse": False, "bytes_total": 9}  # fmt: skip

    def export(source: str, output: Path, *rest: object) -> dict:
        output.mkdir()
        write(output, "onnx_report.json", report)
        if not passes:
            raise GateError("it differs")
        return report

    monkeypatch.setattr("gblm.export.onnx_model.export.export_onnx", export)
    words = ["export", "onnx", "/somewhere/half", "--output", str(tmp_path / "made")]
    monkeypatch.setattr(sys, "argv", ["gblm", *words])
    with contextlib.nullcontext() if passes else pytest.raises(GateError):
        cli(words, standalone_mode=False)
    sources = read_sources([tmp_path / "made"], [])
    assert "<pre>gblm export onnx half --output made</pre>" in html(sources, "x")


def test_every_chart_has_its_figures_in_a_table(tmp_path: Path) -> None:
    record = models_record({"dense": 20.0, "half": 10.0}, concurrency=(1, 4))
    facts = read_sources([write(tmp_path, "m.json", record)], []).facts
    found = [*figures.speeds(facts), *figures.curves(facts)]
    assert len(found) > 4
    for figure in found:
        assert figure.picture.count('class="mark"') >= len(figure.rows) > 0, figure.title


def test_every_figure_of_a_load_stands_in_its_table(tmp_path: Path) -> None:
    record = models_record({"dense": 20.0, "half": 10.0}, concurrency=(1, 4))
    for row in record["rows"][1:]:
        row["metrics"]["peak_memory_mb"] = {"median": 1234.0, "min": 1.0, "max": 2000.0}
    sources = read_sources([write(tmp_path, "m.json", record)], [])
    first, second = measured(sources.facts)
    assert first.header == ("model", "TTFT p50, ms", "TTFT p99, ms", "TPOT p50, ms", "TPOT p99, ms",
                            "E2E p50, ms", "E2E p99, ms", "output tokens/s",
                            "peak MB")  # fmt: skip
    assert first.rows[0] == ("dense", "20", "40", "20", "40", "20", "40", "50", "–")
    assert first.rows[1][-1] == "1234"
    assert "concurrency 4" in second.note
    assert "<td>1234</td>" in html(sources, "x")
    assert "| 1234 |" in markdown(sources, "x")


def test_figures_of_a_loop_and_of_a_server_share_no_chart(tmp_path: Path) -> None:
    served, loop = (models_record({"dense": 20.0, "half": 10.0}) for _ in range(2))
    loop["sides"] = [side | {"engine": "hf"} for side in loop["sides"]]
    paths = [write(tmp_path, "a.json", served), write(tmp_path, "b.json", loop)]
    facts = read_sources(paths, []).facts
    settings = {speed.setting for speed in facts.speeds}
    assert {setting.split(", ")[-2] for setting in settings} == {"vllm (serve)", "hf"}
    assert len(facts.speeds) == 4


def test_an_invalid_run_is_in_no_chart_and_says_why(tmp_path: Path) -> None:
    record = models_record({"dense": 20.0, "half": 10.0}, invalid={"half": "7 preemptions"})
    sources = read_sources([write(tmp_path, "m.json", record)], [])
    assert [speed.name for speed in sources.facts.speeds] == ["dense"]
    assert sources.facts.ratios == []
    assert [one.name for one in sources.facts.measures] == ["dense"]
    page = html(sources, "x")
    assert "INVALID" in page
    assert "7 preemptions" in page
    assert "INVALID" in markdown(sources, "x")


HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(1)>&{{7*7}}'


def test_words_of_a_record_stay_words(tmp_path: Path) -> None:
    record = perplexity_record(HOSTILE, 27.5, protocol=HOSTILE)
    record["command"] = record["baseline"] = HOSTILE
    record["provenance"] = {"device": HOSTILE, "machine": {HOSTILE: HOSTILE}}
    more = models_record({HOSTILE: 20.0, "half": 10.0}, invalid={"half": HOSTILE})
    sources = read_sources([write(tmp_path, "a.json", record), write(tmp_path, "b.json", more)], [])
    page = html(sources, HOSTILE)
    assert "{{7*7}}" in page
    for sign in ("<script", "<img"):
        assert sign not in page, sign
    text = markdown(sources, HOSTILE)
    body = "\n".join(line for line in text.split("---")[-1].splitlines() if line[:4] != "    ")
    assert "<script" not in body.replace("\\<", "")


def test_the_page_loads_and_runs_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", perplexity_record("half", 27.5))
    page = html(read_sources([path], []), "x")
    for sign in ("<script", "http:", "https:", "@import", '<link rel="stylesheet', "url("):
        assert sign not in page, sign


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"kind": "soak"}, "records of kind 'soak' have no place in a report"),
        ({"kind": 7}, "have no place"),
        ({"perplexity": "27"}, "'27' is not a number"),
        ({"perplexity": True}, "'True' is not a number"),
        ({"perplexity": 10**400}, "int too large to convert to float"),
        ({"perplexity": None}, "'None' is not a number"),
        ({"protocol": ["x"]}, "is not text"),
        ({"report": 5}, "is not a record of kind 'perplexity' as gblm writes it"),
    ],
)
def test_a_record_that_is_none_gets_one_sentence(
    tmp_path: Path, change: dict, sentence: str
) -> None:
    path = write(tmp_path, "a.json", perplexity_record("half", 27.5) | change)
    with pytest.raises(InputError, match=r"a\.json") as caught:
        read_sources([path], [])
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["protocol", "perplexity", "model"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    record = perplexity_record("half", 27.5)
    del record[key]
    with pytest.raises(InputError, match=f"'{key}' is missing"):
        read_sources([write(tmp_path, "a.json", record)], [])


def test_a_perplexity_without_end_stands_in_the_table_alone(tmp_path: Path) -> None:
    lost = perplexity_record("lost", 5.0) | {"perplexity": float("inf"), "ratio": float("inf")}
    paths = [write(tmp_path, "a.json", lost),
             write(tmp_path, "b.json", perplexity_record("half", 27.5))]  # fmt: skip
    sources = read_sources(paths, [])
    (figure,) = figures.quality(sources.facts)
    assert "lost: " not in figure.picture
    assert "<td>lost</td><td>∞</td>" in html(sources, "x")
    assert '"lost"' not in markdown(sources, "x").split("---")[1]


def test_model_index_is_yaml_with_the_protocol_of_every_figure(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", perplexity_record("half", 27.5))
    front = markdown(read_sources([path], []), "x").split("---")[1]
    index = {entry["name"]: entry["results"] for entry in yaml.safe_load(front)["model-index"]}
    assert set(index) == {"half", "smol"}
    (metric,) = index["half"][0]["metrics"]
    assert (metric["type"], metric["value"]) == ("perplexity", 27.5)
    assert PERPLEXITY in metric["name"]


def test_recorded_commands_come_back_and_missing_ones_are_admitted(tmp_path: Path) -> None:
    known = perplexity_record("half", 27.5) | {"command": "gblm eval half --seq-len 512"}
    paths = [write(tmp_path, "a.json", known),
             write(tmp_path, "b.json", onnx_record({"half": 1.0}))]  # fmt: skip
    page = html(read_sources(paths, []), "x")
    assert "<pre>gblm eval half --seq-len 512</pre>" in page
    assert "b.json: the record does not say by which command" in page


def test_every_record_of_this_repository_that_is_of_a_known_kind_can_be_shown() -> None:
    root = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
    shown = Sources()
    for path in sorted(root.glob("*.json")):
        if json.loads(path.read_text())["kind"] in {*READERS, "kernels"}:
            shown = read_sources([path], [])
            assert "<svg" in html(shown, path.stem), path
    assert shown.origins


def test_folders_show_masks_layers_and_backends(pack_tiny: Callable[..., Path]) -> None:
    sources = read_sources([pack_tiny(pattern="0.5")], [0, 1])
    (folder,) = sources.folders
    assert len(folder.linears) == len(folder.masks) == 14
    assert {linear.sparsity for linear in folder.linears} == {0.5}
    assert set(folder.heads) == {0, 1}
    mask = folder.masks["1.self_attn.o_proj"]
    means = [float(mask[:, 32 * head : 32 * head + 32].float().mean()) for head in range(4)]
    assert folder.heads[1] == pytest.approx(means, abs=1e-4)
    page = html(sources, "x")
    assert page.count("<image") == 14
    assert "Layer 1, self_attn.o_proj" in page
    assert "Pattern and values" not in page


def test_a_map_of_backends_and_patterns_is_drawn_where_they_differ(
    pack_tiny: Callable[..., Path],
) -> None:
    sources = read_sources([pack_tiny(pattern="0.5")], [0])
    (folder,) = sources.folders
    folder.linears[0] = replace(folder.linears[0], backend="reference", pattern="2:4")
    maps = dict(figures.layers(sources.folders))
    others = {linear.backend for linear in folder.linears[1:]}
    ((picture,), (patterns,)) = (
        [figure.picture for figure in maps[title]] for title in figures.KINDS
    )
    assert picture.count(": reference</title>") == 1
    assert sum(picture.count(f": {name}</title>") for name in others) == 13
    assert patterns.count(": 2:4 bfloat16</title>") == 1


def test_folders_and_layers_that_are_none_are_refused(
    pack_tiny: Callable[..., Path], tiny: Path
) -> None:
    with pytest.raises(InputError, match="is no packed folder"):
        read_sources([tiny], [0])
    with pytest.raises(InputError, match="layer 7; --layer takes 0 to 1"):
        read_sources([pack_tiny()], [0, 7])
    with pytest.raises(InputError, match="two folders are called"):
        read_sources([pack_tiny(), pack_tiny()], [0])


def test_a_damaged_mask_is_refused(packed: Path) -> None:
    shard = next(packed.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    start = header["model.layers.0.mlp.up_proj.bitmask"]["data_offsets"][0] + 8 + length
    data[start] = 255
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"up_proj\.bitmask: row 0"):
        read_sources([packed], [0])


def test_a_mask_picture_is_the_mean_of_its_cells() -> None:
    mask = torch.rand(150, 200, generator=torch.Generator().manual_seed(0)) < 0.3
    mask[:, :50] = False
    cells = pictures.downsample(mask)
    assert float(cells[:, :20].max()) == 0
    uri = pictures.data_uri(cells, (0.0, 1.0))
    rows, columns, levels = decode(uri)
    assert (rows, columns) == tuple(cells.shape)
    assert levels == [round(float(share) * 255) for share in cells.flatten()]


def decode(uri: str) -> tuple[int, int, list[int]]:
    """Oracle: the levels of a PNG of one byte a pixel without filters."""
    import base64

    data = base64.b64decode(uri.partition(",")[2])
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        kind, body = data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        assert struct.unpack(">I", data[at + 8 + size : at + 12 + size])[0] == zlib.crc32(
            kind + body
        )
        chunks[kind] = body
        at += 12 + size
    columns, rows = struct.unpack(">II", chunks[b"IHDR"][:8])
    raw = zlib.decompress(chunks[b"IDAT"])
    lines = [raw[r * (columns + 1) : (r + 1) * (columns + 1)] for r in range(rows)]
    assert all(line[0] == 0 for line in lines)
    return rows, columns, [level for line in lines for level in line[1:]]


@pytest.mark.parametrize(
    "values", [[3.0], [1.0, 1.0], [0.0, 1e-9], [-5.0, 7.0], [1e3, 1e9], [0, 0]]
)
@pytest.mark.parametrize("log", [False, True])
def test_an_axis_holds_its_values_and_some_ticks(values: list[float], log: bool) -> None:
    axis = Axis.around("x", values, 10, 110, log)
    assert 2 <= len(axis.ticks()) <= 8
    for value in [*values, *axis.ticks()]:
        assert axis.low <= value <= axis.high
        assert 10 <= axis.place(value) <= 110


def test_a_ratio_says_which_way_is_better() -> None:
    less = {"joules_per_token", "load_s", "memory_mb", "peak_memory_mb"}
    known = metrics_of([Request(0.0, 1.0, 4, 4, 0.1, (0.3, 0.3, 0.3))], 1.0, Slo(1.0))
    for metric in {*known, *less}:
        small = metric in less or "_ms_" in metric
        assert figures.directed(metric).endswith("(less is better)") == small, metric


def test_numbers_are_read_by_people() -> None:
    found = [number(v) for v in (0.0, 1.0, 12.345, 1234.5, 0.012345, 2.5e7, None, float("inf"))]
    assert found == ["0", "1", "12.3", "1234", "0.0123", "2.5e+07", "–", "∞"]


def test_the_command_writes_both_and_needs_one(
    gblm: Callable[..., Outcome], pack_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    write(tmp_path, "a.json", perplexity_record("half", 27.5))
    done = gblm("--json", "report", "a.json", pack_tiny(), "--html", "r/x.html",
                "--markdown", "x.md")  # fmt: skip
    assert done.code == 0, done
    assert json.loads(done.out) == {"written": ["r/x.html", "x.md"], "records": 1, "folders": 1}
    assert "<svg" in (tmp_path / "r/x.html").read_text()
    assert "model-index:" in (tmp_path / "x.md").read_text()
    refused = gblm("report", "a.json")
    assert refused.code == 2
    assert "give --html FILE" in refused.err
