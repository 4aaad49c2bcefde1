from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gblm.errors import UsageError
from gblm.evaluate.perplexity import Protocol, perplexity
from gblm.evaluate.run import Evaluation, run_evaluation
from gblm.model.loading import load, load_tokenizer
from gblm.packed import load_any


def test_perplexity_follows_the_published_formula(tiny: Path) -> None:
    model = load(tiny, torch.float32)
    windows = torch.randint(256, (3, 20), generator=torch.Generator().manual_seed(0))
    got = perplexity(model, windows)
    losses = []
    with torch.no_grad():
        for window in windows:
            logits = model(input_ids=window.unsqueeze(0)).logits[0].double().log_softmax(-1)
            steps = [-logits[t, window[t + 1]] for t in range(19)]
            losses.append(sum(steps) / 19)
    # lib/eval.py: exp(Σ mean·seqlen / (windows·seqlen)) is the mean over windows.
    assert got == pytest.approx(math.exp(sum(losses) / 3), rel=1e-5)


def test_protocol_stands_beside_the_figure(tiny: Path, text_file: Path) -> None:
    protocol = Protocol(source=str(text_file), seq_len=32, max_windows=2)
    record = run_evaluation(Evaluation(str(tiny), (protocol,), baseline=str(tiny)))
    (load,) = record.loads
    assert load.startswith("text.txt, held-out text as one stream, 2 windows × 32 tokens")
    assert str(text_file.parent) not in load
    assert record.sides["tiny"]["dtype"] == "bfloat16"
    # Of one name, both have a side of their own.
    assert record.baseline == "tiny, baseline"
    ratio = record.ratio("tiny", load, "perplexity")
    assert ratio is not None
    assert ratio.median == 1.0


@pytest.mark.usefixtures("without_bfloat16")
def test_where_bfloat16_is_emulated_a_model_is_measured_in_float32(
    tiny: Path, pack_tiny: Callable[..., Path], text_file: Path
) -> None:
    protocol = Protocol(source=str(text_file), seq_len=32, max_windows=2)
    for folder in (tiny, pack_tiny("wanda", "2:4", "int8")):
        record = run_evaluation(Evaluation(str(folder), (protocol,), baseline=str(tiny)))
        assert [side["dtype"] for side in record.sides.values()] == ["float32", "float32"]


def test_windows_beyond_the_models_positions_are_warned_of(
    tiny: Path, text_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for seq_len in (512, 513):
        caplog.clear()
        protocol = Protocol(source=str(text_file), seq_len=seq_len, max_windows=1)
        run_evaluation(Evaluation(str(tiny), (protocol,)))
        assert ("longer than the model's max_position_embeddings of 512" in caplog.text) == (
            seq_len > 512
        )


def test_a_needed_baseline_that_is_not_there_is_missed_before_anything_is_measured(
    tiny: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gblm.evaluate.run.open_subject", None)
    protocol = Protocol(source=str(text_file), seq_len=32)
    asked = Evaluation(str(tiny), (protocol,), needs_baseline=True)
    with pytest.raises(UsageError, match="to compare with: MODEL is a dense folder, which names"):
        run_evaluation(asked)
    with pytest.raises(UsageError, match="to compare with: --no-baseline"):
        run_evaluation(replace(asked, without_baseline=True))


def test_packed_model_is_measured_on_the_same_tokens(
    tiny: Path, text_file: Path, pack_tiny: Callable[..., Path]
) -> None:
    protocol = Protocol(source=str(text_file), seq_len=32, max_windows=2)
    folder = pack_tiny()
    record = run_evaluation(
        Evaluation(
            str(folder), (protocol,), baseline=str(tiny), dtype="float32", backend="reference"
        )
    )
    ours, theirs = (row for row in record.rows if row.metric == "perplexity")
    assert (ours.side, theirs.side) == (folder.name, "tiny")
    assert ours.value != theirs.value
    model = load_any(folder, "reference", torch.float32)
    windows = protocol.windows(load_tokenizer(tiny))
    assert ours.value == pytest.approx(perplexity(model, windows), rel=1e-6)
