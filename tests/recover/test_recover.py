"""Recovery of the tiny model lowers KL, keeps masks, goes on after a kill, refuses bad input."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome, content, save_tiny_model
from killing import killed_recovery

from gblm.calibrate import text
from gblm.checkpoint.inspect import verify
from gblm.errors import InputError, MachineError, UsageError
from gblm.model.folder import ModelFolder
from gblm.model.loading import load
from gblm.model.packed_reader import PackedReader
from gblm.recipe import Recovering
from gblm.recover import run as run_module
from gblm.recover import train as train_module
from gblm.recover.run import recover
from gblm.recover.teacher import Head, divergence, last_hidden

Pack = Callable[..., Path]


@pytest.fixture
def how(text_file: Path) -> Recovering:
    return Recovering(
        text=str(text_file), held_out=(str(text_file),), tokens=16 * 4 * 32, seq_len=32,
        learning_rate=3e-3,
    )  # fmt: skip


def masks(folder: Path) -> dict[str, torch.Tensor]:
    with PackedReader(ModelFolder.open(folder)) as packed:
        return {
            name: linear.fmt.mask(packed.parts(name)) for name, linear in packed.linears.items()
        }


@pytest.mark.parametrize("train", ["weights", "scales"])
@pytest.mark.parametrize(
    ("pattern", "values", "head"), [("2:4", "float", "float"), ("0.5", "int4", "int8")]
)
def test_it_lowers_kl_and_keeps_every_mask(
    pack_tiny: Pack,
    how: Recovering,
    tmp_path: Path,
    pattern: str,
    values: str,
    head: str,
    train: str,
) -> None:
    start = pack_tiny("wanda", pattern, values, head)
    report = recover(start, tmp_path / "out", how.model_copy(update={"train": train}))
    (before,), (after,) = report["before"].values(), report["after"].values()
    assert report["kept"]
    assert after["kl"] < 0.9 * before["kl"]
    assert after["perplexity_dense"] == before["perplexity_dense"]
    old, new = masks(start), masks(tmp_path / "out")
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert verify(ModelFolder.open(tmp_path / "out"))["ok"]
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["recover"]["tokens"] == how.tokens


def test_what_is_written_is_what_was_measured(
    pack_tiny: Pack, how: Recovering, tmp_path: Path, text_file: Path, tiny: Path
) -> None:
    from gblm import packed

    recover(pack_tiny("wanda", "2:4", "int8"), tmp_path / "out", how)
    report = json.loads((tmp_path / "out" / "sparsity_report.json").read_text())["recover"]
    model, dense = packed.load(tmp_path / "out", backend="dense"), load(ModelFolder.open(tiny))
    tokenizer = run_module.load_tokenizer(tiny)
    windows = run_module.data.evaluation_windows(
        [text_file.read_text()], tokenizer, 32, run_module.HELD_OUT_WINDOWS
    )
    with torch.inference_mode():
        logq, logp = (m(windows).logits[:, :-1].float().log_softmax(-1) for m in (model, dense))
    kl = float((logp.exp() * (logp - logq)).sum(-1).mean())
    assert kl == pytest.approx(next(iter(report["after"].values()))["kl"], rel=0.02)


def test_the_start_is_kept_when_kl_does_not_fall(
    pack_tiny: Pack, how: Recovering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train_module.divergence

    def uphill(*args: torch.Tensor) -> tuple[float, torch.Tensor]:
        loss, gradient = real(*args)  # type: ignore[arg-type]
        return loss, -gradient

    monkeypatch.setattr(train_module, "divergence", uphill)
    start = pack_tiny("wanda", "2:4")
    report = recover(start, tmp_path / "out", how)
    assert not report["kept"]
    with (
        PackedReader(ModelFolder.open(start)) as old,
        PackedReader(ModelFolder.open(tmp_path / "out")) as new,
    ):
        assert {*old} == {*new}
        assert all(torch.equal(old.tensor(name), new.tensor(name)) for name in old)


def test_loss_and_gradient_are_those_of_all_logits_at_once(tiny: Path) -> None:
    model = load(ModelFolder.open(tiny), torch.float32)
    head = Head(model)
    windows = torch.randint(0, 250, (3, 16), generator=torch.Generator().manual_seed(0))
    head.check(model, windows)
    hidden = last_hidden(model, windows).detach().flatten(0, 1)
    ours = (hidden + 0.3 * torch.randn(hidden.shape)).requires_grad_()
    loss, gradient = divergence(ours, hidden, head, head)
    logq = (ours.double() @ head.weight.double().T).log_softmax(-1)
    logp = (hidden.double() @ head.weight.double().T).log_softmax(-1)
    want = (logp.exp() * (logp - logq)).sum(-1).mean()
    want.backward()
    assert loss == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(gradient, ours.grad, rtol=1e-4, atol=1e-7)


def test_logits_are_formed_a_few_tokens_at_a_time(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gblm.recover import teacher

    head = Head(load(ModelFolder.open(tiny), torch.float32))
    hidden = torch.randn(20, head.weight.shape[1])
    whole = divergence(hidden, hidden + 0.1, head, head)
    monkeypatch.setattr(teacher, "LOGITS", 3 * len(head.weight))
    assert head.rows == 3
    parts = divergence(hidden, hidden + 0.1, head, head)
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(parts[1], whole[1], rtol=1e-4, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("values", ["float", "int4"])
def test_killed_it_ends_in_the_same_bytes(
    pack_tiny: Pack, how: Recovering, tmp_path: Path, values: str
) -> None:
    start = pack_tiny("wanda", "2:4", values)
    recover(start, tmp_path / "whole", how)
    for step in (0, 5):
        assert killed_recovery(start, tmp_path / "out", how.model_dump(), step) == -9
        assert not (tmp_path / "out").exists()
    recover(start, tmp_path / "out", how)
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_the_rest_of_another_recovery_is_not_continued(
    pack_tiny: Pack, how: Recovering, tmp_path: Path
) -> None:
    start, other = pack_tiny("wanda", "2:4"), how.model_copy(update={"seed": 1})
    assert killed_recovery(start, tmp_path / "out", how.model_dump(), 2) == -9
    with pytest.raises(InputError, match="another run"):
        recover(start, tmp_path / "out", other)
    recover(start, tmp_path / "out", other, resume=False)


def test_nan_stops_training_and_keeps_the_last_state(
    pack_tiny: Pack, how: Recovering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_module, "SAVE_SECONDS", 0.0)
    real = train_module.divergence
    calls = []

    def broken(*args: torch.Tensor) -> tuple[float, torch.Tensor]:
        calls.append(0)
        loss, gradient = real(*args)  # type: ignore[arg-type]
        return (float("nan") if len(calls) == 4 else loss), gradient

    monkeypatch.setattr(train_module, "divergence", broken)
    start = pack_tiny("wanda", "2:4")
    with pytest.raises(InputError, match=r"diverged at step 4 .*lower --learning-rate"):
        recover(start, tmp_path / "out", how)
    assert (run_module.work_path(tmp_path / "out") / train_module.STATE).exists()
    assert not (tmp_path / "out").exists()


def test_a_recovered_folder_is_refused(pack_tiny: Pack, how: Recovering, tmp_path: Path) -> None:
    recover(pack_tiny("wanda", "2:4"), tmp_path / "once", how)
    with pytest.raises(InputError, match="recovered already"):
        recover(tmp_path / "once", tmp_path / "twice", how)


def test_another_teacher_is_refused(pack_tiny: Pack, how: Recovering, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", intermediate_size=256)
    with pytest.raises(InputError, match="is not the dense model of"):
        recover(pack_tiny("wanda", "2:4"), tmp_path / "out", how, other)


def test_a_dense_folder_is_refused(
    gblm: Callable[..., Outcome], tiny: Path, tmp_path: Path
) -> None:
    done = gblm("recover", str(tiny), "--output", str(tmp_path / "out"))
    assert done.code == 4, done


def test_short_text_is_refused(pack_tiny: Pack, how: Recovering, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    with pytest.raises(InputError, match="no document is longer"):
        recover(pack_tiny(), tmp_path / "out", how.model_copy(update={"text": str(short)}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt"]


def test_a_full_disk_is_said_before_anything_is_computed(
    pack_tiny: Pack, how: Recovering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MachineError, match="GB free"):
        recover(pack_tiny(), tmp_path / "out", how)


def test_a_mix_has_its_shares(tiny: Path, text_file: Path, tmp_path: Path) -> None:
    other = tmp_path / "digits.txt"
    other.write_text("0123456789" * 400)
    tokenizer = run_module.load_tokenizer(tiny)
    windows = text.draw(f"{text_file}:1,{other}:3", tiny, tokenizer, 8, 16, 0, bos=False)
    digits = [tokenizer.decode(row).isdigit() for row in windows]
    assert digits == [False] * 2 + [True] * 6


@pytest.mark.parametrize("mix", ["pydoc:0", "pydoc:-1,self:2", "pydoc,pydoc", ",", ""])
def test_a_bad_mix_is_refused(mix: str) -> None:
    with pytest.raises(UsageError, match="write sources as"):
        text.parse_mix(mix)
