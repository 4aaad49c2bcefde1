"""`gblm eval` records and `gblm compare`: protocols beside figures, and no apples with pears."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome
from record_cases import models_record, onnx_record

from gblm.errors import InputError
from gblm.evaluate.side_by_side import compare, size_facts

Run = Callable[..., Outcome]


def test_folders_side_by_side(tiny: Path, pack_tiny: Callable[..., Path]) -> None:
    rows = {row["what"]: row for row in compare(tiny, pack_tiny())["rows"]}
    assert rows["sparsity"]["a"] == 0.0
    assert rows["sparsity"]["b"] == 0.5
    assert rows["bytes"]["ratio"] < 1
    assert rows["values"]["b"] == "2:4 bfloat16"


def test_records_of_one_protocol_alone_are_compared(
    gblm: Run, tiny: Path, pack_tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    words = ("--text", text_file, "--max-windows", 2, "--no-baseline")
    for name, model, seq_len in (("a", tiny, 32), ("b", pack_tiny(), 32), ("c", tiny, 64)):
        done = gblm("eval", model, *words, "--seq-len", seq_len, "--output", f"{name}.json")
        assert done.code == 0, done
        assert "protocol: text.txt, held-out text as one stream, 2 windows" in done.out
        assert "baseline: none (--no-baseline)" in done.out
    done = gblm("compare", "a.json", "b.json")
    assert done.code == 0, done
    a, b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert f"{b['perplexity'] / a['perplexity']:.3f}" in done.out
    assert "protocol of both: text.txt" in done.out
    done = gblm("compare", "a.json", "c.json")
    assert done.code == 4, done
    assert "different protocols cannot be compared" in done.err
    with pytest.raises(InputError, match="compare two folders or two records"):
        compare(tmp_path / "a.json", tiny)


def test_the_baseline_comes_from_the_recipe_and_stands_beside(
    gblm: Run, tiny: Path, pack_tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Another domain. " * 60)
    done = gblm(
        "eval", pack_tiny(), "--text", text_file, "--text", other, "--seq-len", 32,
        "--max-windows", 1, "--dtype", "float32", "--json",
    )  # fmt: skip
    assert done.code == 0, done
    found = json.loads(done.out)
    assert found["baseline"] == str(tiny)
    assert [row["text"] for row in found["texts"]] == ["text.txt", "other.txt"]
    for row in found["texts"]:
        assert row["protocol"].endswith("no overlap, start tokens of the tokenizer, float32, torch")
        assert row["protocol_baseline"] == row["protocol"]
        assert row["drift"]["kl_mean"] > 0


def test_weights_that_only_another_engine_reads_have_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    (tmp_path / "model.safetensors").write_bytes(bytes(77))
    assert size_facts(tmp_path) == {"bytes": 77, "values": "awq"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--protocol", "gblm", "--seq-len", "64"], "windows of 2048 tokens"),
        (["--protocol", "wanda", "--stride", "64"], "windows of 4096 tokens"),
        (["--seq-len", "32", "--stride", "64"], "would leave out tokens"),
        (["--limit", "3"], "--tasks only"),
        (["--baseline", "x", "--no-baseline"], "do not go together"),
        (["--text", "a.txt", "--text", "b/a.txt"], "different names"),
        (["--no-baseline", "--gate", "top1 >= 0.9"], "needs the dense model"),
    ],
)
def test_contradictions_are_refused(gblm: Run, tiny: Path, words: list[str], sentence: str) -> None:
    done = gblm("eval", tiny, *words)
    assert done.code == 2, done
    assert sentence in done.err


SEARCH = {
    "kind": "search",
    "baseline": {"perplexity": 20.0, "protocol": "text, 8 windows", "tokens_sha256": "ab" * 32},
    "measured": {"int4": {"perplexity": 22.0, "bits_per_weight": 4.5, "bytes": 9}},
}
EXPORT = {
    "kind": "onnx export", "target": "cpu", "precision": "fp32", "sparse": True, "bytes_total": 100,
    "linears": [{"name": "q"}], "weights": [{"shape": [4, 8], "zeros": 16}],
    "validation": {"tokens": 8, "prompt_tokens": 24, "max_logit_difference_over_std": 0.25,
                   "top1_agreement": 1.0, "equal_greedy_tokens": 8, "passed": True},
}  # fmt: skip


def kernels_record(us: float) -> dict:
    return {
        "kind": "bench kernels", "provenance": {"device": "a CPU"},
        "kernels": {"instruction_set": "avx2", "threads": 1, "clock": "wall", "cold_bytes": 9},
        "cases": [{"shape": [8, 16], "tokens": 1, "rows": [{"linear": "2:4", "us": us}]}],
    }  # fmt: skip


def onnx_bench(ms: float) -> dict:
    sizes = {"file_bytes": 9, "memory_bytes": 9, "load_s": 1.0, "prefill_ms": {"median": 3.0}}
    record = onnx_record({"half": ms}) | {"clock": "wall time"}
    record["rows"] = [row | sizes for row in record["rows"]]
    return record


def serving_record(tpot: float) -> dict:
    return {"kind": "bench serving", "provenance": {"device": "a CPU"},
            "load": {"rounds": 3}, "summary": {"tpot_ms": {"model": tpot}}}  # fmt: skip


@pytest.mark.parametrize(
    ("a", "b", "what", "ratio"),
    [
        (onnx_bench(20.0), onnx_bench(10.0), "decode_ms", 0.5),
        (kernels_record(8.0), kernels_record(2.0), "µs, 2:4, 8×16, 1 tokens", 0.25),
        (serving_record(4.0), serving_record(8.0), "tpot_ms", 2.0),
        (models_record({"half": 10.0}), models_record({"half": 30.0}),
         "tpot_ms_p50, half, concurrency 1", 3.0),
        (SEARCH, SEARCH | {"measured": {"int4": SEARCH["measured"]["int4"] | {"perplexity": 33.0}}},
         "perplexity, int4", 1.5),
        (EXPORT, EXPORT | {"bytes_total": 50}, "bytes_total", 0.5),
        (EXPORT, EXPORT, "max_logit_difference_over_std, 8 tokens after 24", 1.0),
        (EXPORT, EXPORT | {"weights": [{"shape": [4, 8], "zeros": 8}]}, "sparsity", 0.5),
    ],
)  # fmt: skip
def test_every_kind_of_record_is_compared(
    tmp_path: Path, a: dict, b: dict, what: str, ratio: float
) -> None:
    for name, record in (("a", a), ("b", b)):
        (tmp_path / f"{name}.json").write_text(json.dumps(record))
    rows = {row["what"]: row for row in compare(tmp_path / "a.json", tmp_path / "b.json")["rows"]}
    assert rows[what]["ratio"] == ratio
    broken = {key: value for key, value in b.items() if key not in ("rows", "cases", "summary")}
    broken = broken | {"baseline": None, "weights": [{}]}
    (tmp_path / "b.json").write_text(json.dumps(broken))
    with pytest.raises(InputError, match=r"b\.json: is not a record of kind"):
        compare(tmp_path / "a.json", tmp_path / "b.json")


def test_what_is_no_figure_is_not_compared(tmp_path: Path) -> None:
    invalid = models_record({"half": 10.0}, invalid={"half": "preempted"})
    other = models_record({"half": 10.0}) | {"provenance": {"device": "another CPU"}}
    records = {"a": models_record({"half": 10.0}), "invalid": invalid, "other": other,
               "watch": {"kind": "bench watch"}, "soak": {"kind": "soak"}}  # fmt: skip
    paths = {name: tmp_path / f"{name}.json" for name in records}
    for name, record in records.items():
        paths[name].write_text(json.dumps(record))
    rows = {row["what"]: row for row in compare(paths["a"], paths["invalid"])["rows"]}
    assert rows["half, concurrency 1"]["b"] == "INVALID"
    assert rows["tpot_ms_p50, half, concurrency 1"]["b"] is None
    for name, sentence in (
        ("other", "different protocols cannot be compared"),
        ("watch", "compares two servers already"),
        ("soak", "kind 'soak' cannot be compared; give two of one kind: evaluation, search"),
    ):
        with pytest.raises(InputError, match=sentence):
            compare(paths["a"], paths[name])
