"""`gblm report`: what it takes from records and folders, what it refuses, what it writes."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import Outcome
from record_cases import PERPLEXITY, models_record, onnx_record, perplexity_record

from gblm.commands.common import command_line
from gblm.errors import InputError
from gblm.report import figures, pictures
from gblm.report.axes import Axis, number
from gblm.report.markdown import markdown
from gblm.report.page import html
from gblm.report.sources import READERS, Sources, read_sources


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
    assert gblm("eval", packed, "--baseline", tiny, *words, "--output", "record.json").code == 0
    record = json.loads((tmp_path / "record.json").read_text())
    ours, dense = read_sources([tmp_path / "record.json"], []).facts.quality
    assert (ours.name, dense.name) == (packed.name, tiny.name)
    assert (ours.perplexity, ours.ratio) == (record["perplexity"], record["ratio"])
    assert dense.perplexity == record["perplexity_baseline"]
    assert ours.num_bytes == record["size"]["bytes"]
    assert ours.bits is not None


def test_every_chart_has_its_figures_in_a_table(tmp_path: Path) -> None:
    record = models_record({"dense": 20.0, "half": 10.0}, concurrency=(1, 4))
    facts = read_sources([write(tmp_path, "m.json", record)], []).facts
    found = [*figures.speeds(facts), *figures.curves(facts)]
    assert len(found) > 4
    for figure in found:
        assert figure.picture.count('class="mark"') >= len(figure.rows) > 0, figure.title


def test_an_invalid_run_is_in_no_chart_and_says_why(tmp_path: Path) -> None:
    record = models_record({"dense": 20.0, "half": 10.0}, invalid={"half": "7 preemptions"})
    sources = read_sources([write(tmp_path, "m.json", record)], [])
    assert [speed.name for speed in sources.facts.speeds] == ["dense"]
    assert sources.facts.ratios == []
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


def test_a_recorded_command_names_no_folder_of_the_machine() -> None:
    words = ["bench", "models", "/home/me/dense", "q=hf:/home/me/x", "--log=/var/l.txt", "~/a/b",
             "runs/half", "http://127.0.0.1:8000", "--slo", "ttft:5,tpot:3"]  # fmt: skip
    assert command_line(words) == (
        "gblm bench models dense q=hf:x --log=l.txt b runs/half http://127.0.0.1:8000 "
        "--slo ttft:5,tpot:3"
    )
