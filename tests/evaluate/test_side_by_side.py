"""`gblm eval` records and `gblm compare`: protocols beside figures, and no apples with pears."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

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
        assert row["protocol"].endswith("no overlap, no special tokens, float32, torch")
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
