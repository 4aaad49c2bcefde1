"""Own text: the dense model writes it, once for a seed, in chats where it has a template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gblm.calibrate import own_text, text
from gblm.model.loading import load_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Writer:
    """A sampler that says one word, and remembers what it was asked."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.asked = tokenizer, list[tuple[str, bool]]()

    def __call__(self, prompts: Sequence[Sequence[int]], seed: int, ends: bool) -> list[list[int]]:
        self.asked += [(self.tokenizer.decode(prompt), ends) for prompt in prompts]
        return [self.tokenizer("word")["input_ids"] for _ in prompts]


def test_without_a_template_it_runs_freely_from_the_start_token(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    writer = Writer(tokenizer)
    ids = own_text._write(writer, tokenizer, 20, 0)
    assert len(ids) >= 20
    assert set(writer.asked) == {("<s>", False)}


def test_the_model_asks_and_answers_itself_in_the_template(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = CHAT
    writer = Writer(tokenizer)
    ids = own_text._write(writer, tokenizer, 8, 0)
    assert ("<user>", True) in writer.asked
    assert ("<user>word\n<assistant>", True) in writer.asked
    assert "<user>word\n<assistant>word" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    "engine", [own_text._Transformers, pytest.param(own_text._Vllm, marks=pytest.mark.vllm)]
)
def test_engines_continue_prompts_reproducibly(
    tiny: Path, engine: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "LENGTH", 12)
    sample = engine(tiny)
    prompts = [[256], [256, 70, 71]]
    first = sample(prompts, 3, ends=False)
    assert [len(row) for row in first] == [12, 12]
    assert first == sample(prompts, 3, ends=False)
    assert first != sample(prompts, 4, ends=False)
    assert all(len(row) <= 12 for row in sample(prompts, 3, ends=True))


def test_it_is_written_once_and_cut_into_windows(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(own_text, "LENGTH", 16)
    tokenizer = load_tokenizer(tiny)
    monkeypatch.setattr(own_text, "_sampler", own_text._Transformers)
    windows = text.draw("self", tiny, tokenizer, 3, 20, 0, bos=True)
    assert windows.shape == (3, 20)

    def broken(folder: Path) -> own_text.Sampler:
        raise AssertionError("it is in the cache")

    monkeypatch.setattr(own_text, "_sampler", broken)
    assert torch.equal(windows, text.draw("self", tiny, tokenizer, 3, 20, 0, bos=True))
