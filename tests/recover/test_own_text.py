"""Own text: the dense model writes it, once for a seed, in chats where it has a template."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

from gblm.calibrate import own_text, text
from gblm.errors import MachineError
from gblm.model.loading import load_tokenizer
from gblm.prune import prune
from gblm.recipe import Calibration, Recipe, Recovering
from gblm.recover.texts import TRAINING, read_texts

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Writer:
    """A sampler that says one word, and remembers what it was asked."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.asked = tokenizer, list[tuple[str, bool]]()

    def __call__(
        self, prompts: Sequence[Sequence[int]], seed: int, ends: Sequence[bool]
    ) -> list[list[int]]:
        self.asked += [
            (self.tokenizer.decode(p), end) for p, end in zip(prompts, ends, strict=True)
        ]
        return [self.tokenizer("word")["input_ids"] for _ in prompts]


def test_without_a_template_it_runs_freely_from_the_start_token(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    writer = Writer(tokenizer)
    ids = own_text._round(writer, tokenizer, 0, 3)
    assert len(ids) == 3 * len(tokenizer("word")["input_ids"])
    assert set(writer.asked) == {("<s>", False)}


def test_the_model_asks_and_answers_itself_in_the_template(tiny: Path) -> None:
    tokenizer = load_tokenizer(tiny)
    tokenizer.chat_template = CHAT
    writer = Writer(tokenizer)
    ids = own_text._round(writer, tokenizer, 0, 2)
    assert ("<user>", True) in writer.asked
    assert ("<user>word\n<assistant>", True) in writer.asked
    assert "<user>word\n<assistant>word" in tokenizer.decode(ids)


@pytest.mark.parametrize(
    "engine", [own_text.in_transformers, pytest.param(own_text.in_vllm, marks=pytest.mark.vllm)]
)
def test_engines_continue_prompts_reproducibly(
    tiny: Path, engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_text, "LENGTH", 12)
    monkeypatch.setattr(own_text, "BATCH", 1)
    prompts = [[256], [256, 70, 71]]
    with engine(tiny) as sample:
        first = sample(prompts, 3, [False, False])
        assert [len(row) for row in first] == [12, 12]
        assert first == sample(prompts, 3, [False, False])
        assert first != sample(prompts, 4, [False, False])
        assert all(len(row) <= 12 for row in sample(prompts, 3, [True, True]))


@pytest.mark.vllm
def test_an_engine_that_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="vLLM"), own_text.in_vllm(tmp_path / "nothing"):
        pytest.fail("it started")


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Keep the text in a new cache, in short pieces; tells what models were opened to write it."""
    opened = list[Path]()

    def engine(folder: Path) -> AbstractContextManager[own_text.Sampler]:
        opened.append(folder)
        return own_text.in_transformers(folder)

    monkeypatch.setattr(own_text, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(own_text, "LENGTH", 16)
    monkeypatch.setattr(own_text, "FIRST", 2)
    monkeypatch.setattr(own_text, "MOST", 4)
    monkeypatch.setattr(own_text, "_engine", lambda: engine)
    return opened


def test_it_is_written_once_and_cut_into_windows(tiny: Path, engines: list[Path]) -> None:
    tokenizer = load_tokenizer(tiny)
    own = Calibration(source="self", num_samples=3, seq_len=20)
    windows = text.draw(own, tiny, tokenizer)
    assert windows.shape == (3, 20)
    assert torch.equal(windows, text.draw(own, tiny, tokenizer))
    assert engines == [tiny]
    longer = text.draw(own.model_copy(update={"num_samples": 6}), tiny, tokenizer)
    assert torch.equal(windows, longer[:3])


def test_two_processes_at_once_write_it_once(tiny: Path, engines: list[Path]) -> None:
    tokenizer = load_tokenizer(tiny)
    with ThreadPoolExecutor() as pool:
        asked = [pool.submit(own_text.own_text, tiny, tokenizer, 100, 0) for _ in range(4)]
        first, *others = [one.result() for one in asked]
    assert all(other == first for other in others)
    assert engines == [tiny]


OWN = Calibration(source="self", num_samples=8, seq_len=32, bos=False)


@pytest.mark.parametrize(
    ("before", "read"),
    [
        (None, 4),
        (Calibration(source="pydoc", num_samples=8, seq_len=32), 4),
        (OWN.model_copy(update={"seed": 1}), 4),
        (OWN.model_copy(update={"num_samples": 2}), 4),
        (OWN, 8),
        (OWN.model_copy(update={"seq_len": 33}), 9),
    ],
    ids=["nothing", "other text", "another seed", "less text", "more text", "part of a window"],
)
def test_recovery_is_measured_behind_what_it_and_pruning_read(
    tiny: Path, text_file: Path, engines: list[Path], before: Calibration | None, read: int
) -> None:
    how = Recovering(text=f"{text_file}:1,self:2", held_out=("self",), seq_len=32, bos=False)
    tokenizer = load_tokenizer(tiny)
    windows = read_texts(how, before, tiny, tokenizer, 6 * 32)
    stream = own_text.own_text(tiny, tokenizer, (read + 16) * 32, how.seed)
    assert windows[TRAINING][2:].flatten().tolist() == stream[: 4 * 32]
    assert windows["self"].flatten().tolist() == stream[read * 32 :]
    assert engines == [tiny]


def test_pruning_and_recovery_open_the_writing_model_once(
    tiny: Path, tmp_path: Path, engines: list[Path]
) -> None:
    how = Recovering(text="self", held_out=("self",), seq_len=32, tokens=4 * 32)
    own = Calibration(source="self", num_samples=2, seq_len=32)
    recipe = Recipe(model=str(tiny), method="wanda", calibration=own, recover=how)
    prune(recipe, tmp_path / "out")
    assert engines == [tiny]
