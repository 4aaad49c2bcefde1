"""One interface for all engines: they say the same of the same tokens."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gblm.errors import InputError, UsageError
from gblm.evaluate.perplexity import Drift, Protocol, measure, of_loss, perplexity
from gblm.evaluate.run import Evaluation, known_baseline, run_evaluation
from gblm.evaluate.subjects import Scores, Subject, TorchSubject, open_subject
from gblm.export.onnx import decoder
from gblm.kernels import native
from gblm.model.folder import ModelFolder
from gblm.model.loading import load_tokenizer
from gblm.packed import SparseLinear
from gblm.recipe import Recovering
from gblm.recover.run import recover

Pack = Callable[..., Path]
# float32 on both sides; only the order of sums differs.
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(256, (3, 40), generator=torch.Generator().manual_seed(0))


def logprobs(subject: Subject, windows: torch.Tensor) -> torch.Tensor:
    return torch.stack([subject.score(window).logprobs for window in windows])


def test_hf_scores_are_those_of_plain_log_softmax(tiny: Path, windows: torch.Tensor) -> None:
    subject = open_subject(ModelFolder.open(tiny), dtype="float32")
    assert isinstance(subject, TorchSubject)
    with torch.no_grad():
        logits = subject.model(input_ids=windows).logits.double()
    want = torch.stack([
        torch.stack([row[t].log_softmax(-1)[w[t + 1]] for t in range(39)])
        for row, w in zip(logits, windows, strict=True)
    ])  # fmt: skip
    torch.testing.assert_close(logprobs(subject, windows).double(), want, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_packed_and_onnx_agree(
    pack_tiny: Pack, exported: Path, tiny: Path, windows: torch.Tensor
) -> None:
    packed = open_subject(ModelFolder.open(pack_tiny()), dtype="float32", backend="reference")
    onnx = open_subject(ModelFolder.open(exported))
    assert (packed.engine, onnx.engine, onnx.dtype) == ("packed", "onnx", "float32")
    torch.testing.assert_close(
        logprobs(onnx, windows), logprobs(packed, windows), atol=TOLERANCE, rtol=0
    )
    dense = open_subject(ModelFolder.open(tiny), dtype="float32")
    assert (logprobs(dense, windows) - logprobs(packed, windows)).abs().max() > 0.1


def test_without_kernels_for_its_dtype_a_packed_model_is_expanded_once(
    pack_tiny: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    def backends(dtype: str) -> set[str]:
        opened = open_subject(ModelFolder.open(pack_tiny()), dtype=dtype)
        assert isinstance(opened, TorchSubject)
        linears = (m for m in opened.model.modules() if isinstance(m, SparseLinear))
        return {linear.backend.name for linear in linears if linear.backend}

    assert backends("float32") == {"dense"}
    assert backends("bfloat16") == {"dense" if native.refusal() else "cpu"}
    monkeypatch.setenv("GBLM_BACKEND", "reference")
    assert backends("float32") == {"reference"}


def test_an_exported_folder_refuses_what_it_cannot_have(exported: Path) -> None:
    with pytest.raises(UsageError, match="computes in float32, not in --dtype float16"):
        open_subject(ModelFolder.open(exported), dtype="float16")
    with pytest.raises(UsageError, match="do not go with an exported folder"):
        open_subject(ModelFolder.open(exported), backend="dense")


def test_a_model_has_no_drift_from_itself_and_some_from_another(
    tiny: Path, pack_tiny: Pack, text_file: Path
) -> None:
    protocol = Protocol(str(text_file), 32, 2)
    dense, packed = (
        open_subject(ModelFolder.open(folder), dtype="float32") for folder in (tiny, pack_tiny())
    )
    tokenizer = load_tokenizer(tiny)
    rows = measure({"same": dense, "dense": dense}, [protocol], tokenizer)
    same = {row.metric: row.value for row in rows if row.side == "same"}
    assert (same["drift_mean"], same["kl_mean"], same["top1"]) == (0.0, 0.0, 1.0)
    rows = measure({"half": packed, "dense": dense}, [protocol], tokenizer)
    (theirs,) = [row.value for row in rows if row.side == "dense"]
    ours = {row.metric: row.value for row in rows if row.side == "half"}
    assert rows[0].metric == "perplexity"
    assert ours["perplexity"] != theirs == same["perplexity"]
    assert ours["kl_mean"] > 0.01
    assert ours["top1"] < 1.0
    assert isinstance(dense, TorchSubject)
    want = perplexity(dense.model, protocol.windows(tokenizer))
    assert theirs == pytest.approx(want, rel=1e-5)


def test_drift_is_that_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(1)
    window = torch.randint(7, (12,), generator=generator)
    ours, theirs = torch.randn(2, 12, 7, generator=generator)
    drift = Drift()
    drift.add(Scores.of(ours, window), Scores.of(theirs, window))
    q, p = ours.double().softmax(-1).tolist(), theirs.double().softmax(-1).tolist()
    changes, kls, same = [], [], 0
    for t in range(11):
        token = int(window[t + 1])
        changes.append(abs(math.log(q[t][token] / p[t][token])))
        kls.append(sum(a * math.log(a / b) for a, b in zip(p[t], q[t], strict=True)))
        same += q[t].index(max(q[t])) == p[t].index(max(p[t]))
    found = drift.summary()
    assert found["drift_mean"] == pytest.approx(sum(changes) / 11, rel=1e-5)
    assert found["kl_mean"] == pytest.approx(sum(kls) / 11, rel=1e-4)
    assert found["top1"] == pytest.approx(same / 11)


def test_what_is_no_number_agrees_with_nothing() -> None:
    window = torch.tensor([0, 1, 2])
    broken, drift = Scores.of(torch.full((3, 5), torch.nan), window), Drift()
    drift.add(broken, broken)
    assert drift.summary()["top1"] == 0
    assert math.isnan(of_loss(math.nan))


def test_a_model_of_that_name_elsewhere_is_no_baseline(
    tiny: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GBLM_CACHE", str(tmp_path / "cache"))  # as on another machine
    shutil.copytree(tiny, tmp_path / "here" / tiny.name)
    monkeypatch.chdir(tmp_path / "here")
    moved = Path(shutil.copytree(packed, tmp_path / "there" / "packed"))
    assert known_baseline(ModelFolder.open(moved))[0] is None
    with pytest.raises(UsageError, match=r"which is not here: give --baseline"):
        recover(moved, tmp_path / "out", Recovering())
    beside = Path(shutil.copytree(tiny, tmp_path / "there" / tiny.name))
    assert known_baseline(ModelFolder.open(moved))[0] == ModelFolder.open(beside)


def test_an_export_is_measured_at_more_tokens_than_its_cache_has_by_itself(
    exported: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "CAPACITY", 16)
    asked = Evaluation(str(exported), (Protocol(str(text_file), 64, 1),), without_baseline=True)
    assert run_evaluation(asked).rows


def test_a_baseline_with_another_vocabulary_is_refused(
    tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    asked = Evaluation(str(tiny), (Protocol(str(text_file), 64, 1),), baseline=str(other))
    with pytest.raises(InputError, match="has 258 tokens and the baseline 300"):
        run_evaluation(asked)


def test_the_dense_model_is_found_from_what_was_made_of_it(
    tiny: Path, pack_tiny: Pack, exported: Path, packed: Path
) -> None:
    assert known_baseline(ModelFolder.open(pack_tiny())) == (
        ModelFolder.open(tiny), "named by recipe.json",
    )  # fmt: skip
    assert known_baseline(ModelFolder.open(exported))[0] == ModelFolder.open(tiny)
    assert known_baseline(ModelFolder.open(tiny))[0] is None
    recipe = json.loads((packed / "recipe.json").read_text())
    (packed / "recipe.json").write_text(json.dumps(recipe | {"model": "gone"}))
    found, why = known_baseline(ModelFolder.open(packed))
    assert found is None
    assert "gone, which is not here; give --baseline" in why
