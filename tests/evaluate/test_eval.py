"""`gblm eval`: the baseline beside the model, contradictions refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Outcome

from gblm.evaluate.run import size_facts
from gblm.model.folder import ModelFolder
from gblm.report.tables import number

Run = Callable[..., Outcome]


def test_the_baseline_comes_from_the_recipe_and_stands_beside(
    gblm: Run, tiny: Path, pack_tiny: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Another domain. " * 60)
    out = pack_tiny().name
    words = ("eval", pack_tiny(), "--text", text_file, "--text", other, "--seq-len", 32,
             "--max-windows", 1, "--dtype", "float32")  # fmt: skip
    done = gblm(*words, "--json")
    assert done.code == 0, done
    found = json.loads(done.out)
    assert found["baseline"] == "tiny"
    assert found["verdict"]["notes"] == ["baseline: tiny (named by recipe.json)"]
    assert found["sides"]["tiny"]["bytes"] > found["sides"][out]["bytes"]
    assert {facts["dtype"] for facts in found["sides"].values()} == {"float32"}
    for text in ("text.txt", "other.txt"):
        rows = {(row["side"], row["metric"]): row["value"] for row in found["rows"]
                if row["load"].startswith(f"{text}, ")}  # fmt: skip
        assert rows[out, "perplexity"] != rows["tiny", "perplexity"]
        assert rows[out, "kl_mean"] > 0
    shown = gblm(*words)
    assert shown.out.count("as one stream, 1 windows × 32 tokens, no overlap, start tokens of") == 2
    ratio = rows[out, "perplexity"] / rows["tiny", "perplexity"]
    assert f"({number(ratio)})" in shown.out


def test_weights_that_only_another_engine_reads_have_bytes(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "awq"}}')
    (tmp_path / "model.safetensors").write_bytes(bytes(77))
    assert size_facts(ModelFolder.open(tmp_path)) == {"bytes": 77, "values": "awq"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--limit", "3"], "--tasks only"),
        (["--baseline", "x", "--no-baseline"], "do not go together"),
        (["--text", "a.txt", "--text", "b/a.txt"], "different names"),
        (["--no-baseline", "--gate", "top1 >= 0.9"], "needs the dense model"),
        (["--gate", "ppl >= 2"], "ppl takes <="),
    ],
)
def test_contradictions_are_refused(gblm: Run, tiny: Path, words: list[str], sentence: str) -> None:
    done = gblm("eval", tiny, *words)
    assert done.code == 2, done
    assert sentence in done.err
