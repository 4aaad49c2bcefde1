from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch

from gblm import data
from gblm.errors import InputError, MachineError, UsageError


class Words:
    """A tokenizer that numbers whitespace-separated words and may put ids before a prompt."""

    def __init__(self, *start: int) -> None:
        self.start = list(start)

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        start = self.start if add_special_tokens else []
        return {"input_ids": start + [int(word) for word in text.split()]}


def numbers(count: int, start: int = 0) -> str:
    return " ".join(map(str, range(start, start + count)))


def test_one_document_is_sampled_as_the_papers_do() -> None:
    windows = data.calibration_windows([numbers(100)], Words(), 5, 10, seed=3)
    rng = random.Random(3)
    starts = [rng.randint(0, 100 - 10 - 1) for _ in range(5)]
    assert windows.tolist() == [list(range(s, s + 10)) for s in starts]


def test_several_documents_skip_those_that_are_too_short() -> None:
    documents = [numbers(5), numbers(50, 1000), numbers(8)]
    windows = data.calibration_windows(documents, Words(), 4, 10, seed=0)
    assert windows.shape == (4, 10)
    assert (windows >= 1000).all()


def test_same_seed_same_windows_other_seed_other_windows() -> None:
    draw = [data.calibration_windows([numbers(500)], Words(), 3, 8, seed=s) for s in (0, 0, 1)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


@pytest.mark.parametrize("documents", [[numbers(10)], [numbers(3), numbers(9)]])
def test_too_short_text_is_refused_instead_of_searched_forever(documents: list[str]) -> None:
    with pytest.raises(InputError, match="no document is longer than 10 tokens"):
        data.calibration_windows(documents, Words(), 1, 10, seed=0)


def test_evaluation_windows_do_not_overlap_and_drop_the_tail() -> None:
    windows = data.evaluation_windows([numbers(25)], Words(), 10)
    assert windows.tolist() == [list(range(10)), list(range(10, 20))]
    assert data.evaluation_windows([numbers(25)], Words(), 10, max_windows=1).shape == (1, 10)
    with pytest.raises(InputError, match="fewer than one window"):
        data.evaluation_windows([numbers(5)], Words(), 10)


def test_windows_begin_as_a_prompt_begins() -> None:
    tokenizer, text = Words(-2, -1), [numbers(100)]
    drawn = data.calibration_windows(text, tokenizer, 5, 10, seed=3)
    assert drawn[:, :2].tolist() == [[-2, -1]] * 5
    assert torch.equal(drawn[:, 2:], data.calibration_windows(text, Words(), 5, 8, seed=3))
    cut = data.evaluation_windows(text, tokenizer, 10)
    assert cut.shape == (12, 10)
    assert cut[:, :2].tolist() == [[-2, -1]] * 12
    assert cut[:, 2:].flatten().tolist() == list(range(96))


def test_papers_windows_have_no_start_tokens() -> None:
    tokenizer, text = Words(-1), [numbers(100)]
    drawn = data.calibration_windows(text, tokenizer, 3, 10, seed=3, bos=False)
    assert torch.equal(drawn, data.calibration_windows(text, Words(), 3, 10, seed=3))
    cut = data.evaluation_windows(text, tokenizer, 10, bos=False)
    assert cut.flatten().tolist() == list(range(100))


def test_pydoc_parts_share_no_paragraph() -> None:
    parts = [data.read_documents("pydoc", split)[0] for split in ("calibration", "held-out")]
    assert len(parts[0]) > 300_000
    assert len(parts[1]) > 40_000
    calibration = set(parts[0].split("\n\n"))
    held_out = parts[1].split("\n\n")
    assert not calibration & set(held_out)


def test_files_of_every_kind_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    assert data.read_documents(str(tmp_path / "a.txt"), "calibration") == ["hello"]
    assert data.read_documents(str(tmp_path / "b.jsonl"), "held-out") == ["one", "two"]
    (tmp_path / "d.jsonl").write_text('{"text": "a\u2028b"}\n', encoding="utf-8")
    assert data.read_documents(str(tmp_path / "d.jsonl"), "held-out") == ["a\u2028b"]
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow: make dev installs it")
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow: make dev installs it")
    parquet.write_table(pyarrow.table({"text": ["x", "y"]}), tmp_path / "c.parquet")
    assert data.read_documents(str(tmp_path / "c.parquet"), "calibration") == ["x", "y"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '{"words": 1}'),
        ("b.jsonl", "no json"),
        ("c.txt", ""),
        ("d.parquet", "junk"),
        ("e.jsonl", '{"text": null}'),
        ("f.jsonl", r'{"text": "\ud800"}'),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=name):
        data.read_documents(str(tmp_path / name), "calibration")


def test_binary_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        data.read_documents(str(tmp_path / "a.txt"), "calibration")


def test_missing_files_and_unknown_names_are_told_apart() -> None:
    with pytest.raises(InputError, match="does not exist"):
        data.read_documents("nowhere.txt", "calibration")
    with pytest.raises(UsageError, match="pydoc, wikitext2, c4"):
        data.read_documents("wikitext103", "calibration")


def test_named_set_without_network_points_to_the_offline_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets: make dev installs it")

    def unreachable(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(MachineError, match="use the default `pydoc`"):
        data.read_documents("c4", "calibration")


def test_fingerprint_changes_with_the_tokens() -> None:
    a, b = torch.arange(6).reshape(2, 3), torch.arange(6).reshape(2, 3)
    b[0, 0] = 9
    assert data.fingerprint(a) != data.fingerprint(b)
    assert len(json.dumps(data.fingerprint(a))) == 66
