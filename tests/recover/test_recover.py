"""Recovery of the tiny model lowers KL, keeps masks, goes on after a kill, refuses bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from conftest import Outcome, content, save_tiny_model
from killing import killed_recovery
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig
from weights import stored

from gblm.calibrate import text
from gblm.checkpoint.inspect import verify
from gblm.checkpoint.write import file_hashes
from gblm.errors import GblmError, InputError, MachineError, UsageError
from gblm.model.folder import ModelFolder
from gblm.model.loading import load
from gblm.prune import Output, dry_run, prune
from gblm.prune import run as prune_module
from gblm.recipe import Calibration, Recipe, Recovering
from gblm.recover import needs
from gblm.recover import run as run_module
from gblm.recover import train as train_module
from gblm.recover.run import recover
from gblm.recover.teacher import Head, divergence, last_hidden

Pack = Callable[..., Path]


@pytest.fixture
def how(text_file: Path) -> Recovering:
    return Recovering(
        text=str(text_file), held_out=(str(text_file),), tokens=16 * 4 * 32, seq_len=32,
        learning_rate=0.05,
    )  # fmt: skip


@pytest.mark.parametrize("train", ["weights", "scales"])
@pytest.mark.parametrize(
    ("pattern", "values", "head"),
    [("2:4", "float", "float"), ("0.5", "int4", "int4"), ("dense", "int3", "int4")],
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
    old, new = stored(start), stored(tmp_path / "out")
    assert old.keys() == new.keys()
    assert all(torch.equal(weight.mask, new[name][1].mask) for name, (_, weight) in old.items())
    assert verify(ModelFolder.open(tmp_path / "out"))["ok"]
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert recipe["recover"]["tokens"] == how.tokens
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{before['kl']:.3f} → {after['kl']:.3f}" in card


def test_the_dense_model_keeps_its_own_head_and_embeddings(
    pack_tiny: Pack, how: Recovering, tmp_path: Path
) -> None:
    told = set()
    for head in ("float", "int8"):
        report = recover(pack_tiny("wanda", "2:4", "int4", head), tmp_path / head, how)
        told.add(next(iter(report["before"].values()))["perplexity_dense"])
    assert len(told) == 1


@pytest.mark.usefixtures("without_bfloat16")
def test_where_bfloat16_is_emulated_both_models_compute_in_float32(
    pack_tiny: Pack, how: Recovering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    monkeypatch.setattr(run_module, "load", lambda *how: loaded.append(load(*how)) or loaded[-1])
    start = pack_tiny("wanda", "2:4", "float")
    assert recover(start, tmp_path / "out", how)["kept"]
    assert {weight.dtype for weight in loaded[0].parameters()} == {torch.float32}
    old, new = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "out"))
    assert {n: tensor.dtype for n, tensor in new.items()} == {n: t.dtype for n, t in old.items()}


def test_what_is_written_is_what_was_measured(
    pack_tiny: Pack, how: Recovering, tmp_path: Path, text_file: Path, tiny: Path
) -> None:
    from gblm import packed

    recover(pack_tiny("wanda", "2:4", "int8"), tmp_path / "out", how)
    report = json.loads((tmp_path / "out" / "sparsity_report.json").read_text())["recover"]
    model, dense = packed.load(tmp_path / "out", backend="dense"), load(ModelFolder.open(tiny))
    tokenizer = run_module.load_tokenizer(tiny)
    windows = run_module.data.evaluation_windows(
        [text_file.read_text()], tokenizer, 32, needs.HELD_OUT_WINDOWS
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
    old, new = (load_file(folder / "model.safetensors") for folder in (start, tmp_path / "out"))
    assert old.keys() == new.keys()
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())


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
@pytest.mark.usefixtures("own_cpu")
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


@pytest.mark.slow
@pytest.mark.usefixtures("own_cpu")
def test_two_processes_share_each_batch(
    pack_tiny: Pack, how: Recovering, tmp_path: Path, text_file: Path
) -> None:
    start, out = pack_tiny(), tmp_path / "two"
    one = recover(start, tmp_path / "one", how)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "gblm", "recover", start, "--output", out, "--text", text_file, "--held-out",
        text_file, "--tokens", how.tokens, "--seq-len", 32, "--learning-rate", 0.05, "--json",
    ]  # fmt: skip
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (found,) = (json.loads(line) for line in done.stdout.splitlines())
    (alone,), (shared,) = one["after"].values(), found["after"].values()
    assert shared["kl"] == pytest.approx(alone["kl"], rel=0.1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


def test_held_out_texts_have_names_of_their_own(
    pack_tiny: Pack, how: Recovering, tmp_path: Path, text_file: Path
) -> None:
    other = tmp_path / text_file.name
    shutil.copy(text_file, other)
    both = how.model_copy(update={"held_out": (str(text_file), str(other))})
    with pytest.raises(UsageError, match="rename one"):
        recover(pack_tiny(), tmp_path / "out", both)


def test_a_text_that_is_trained_on_and_held_out_is_named(
    pack_tiny: Pack, how: Recovering, tmp_path: Path, text_file: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    recover(pack_tiny(), tmp_path / "one", how.model_copy(update={"held_out": ("pydoc",)}))
    assert "is trained on, too" not in caplog.text
    recover(pack_tiny(), tmp_path / "two", how)
    assert f"{text_file} is trained on, too" in caplog.text


def test_the_rest_of_another_recovery_is_not_continued(
    pack_tiny: Pack, how: Recovering, tmp_path: Path
) -> None:
    start, other = pack_tiny("wanda", "2:4"), how.model_copy(update={"seed": 1})
    assert killed_recovery(start, tmp_path / "out", how.model_dump(), 2) == -9
    with pytest.raises(InputError, match="another run"):
        recover(start, tmp_path / "out", other)
    recover(start, tmp_path / "out", other, resume=False)


def test_text_that_changed_since_a_run_was_cut_off_is_read_anew(
    pack_tiny: Pack, how: Recovering, tmp_path: Path, text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def cut_off(*args: object) -> None:
        raise KeyboardInterrupt

    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text()[::-1])
    how = how.model_copy(update={"text": str(text), "held_out": (str(text),)})
    with monkeypatch.context() as patched:
        patched.setattr(train_module.Trainer, "run", cut_off)
        with pytest.raises(KeyboardInterrupt):
            recover(pack_tiny(), tmp_path / "out", how)
    shutil.copy(text_file, text)
    found = recover(pack_tiny(), tmp_path / "out", how)
    whole = recover(pack_tiny(), tmp_path / "whole", how)
    assert found["losses"] == whole["losses"]
    assert found["after"] == whole["after"]


def test_no_output_replaces_a_dense_model(
    pack_tiny: Pack, how: Recovering, recipe: Recipe, tmp_path: Path
) -> None:
    dense = Path(shutil.copytree(recipe.model, tmp_path / "dense"))
    with pytest.raises(InputError, match="cannot be replaced: it holds"):
        recover(pack_tiny(), dense, how, dense, overwrite=True)
    own = recipe.model_copy(update={"model": str(dense)})
    with pytest.raises(InputError, match="cannot be replaced: it holds"):
        prune(own, prune_module.Output(dense, overwrite=True))
    assert file_hashes(dense) == file_hashes(Path(recipe.model))


def test_while_one_run_prunes_to_recover_another_may_not(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = prune_module.recover, []

    def meanwhile(*args: object, **given: object) -> object:
        with pytest.raises(MachineError, match="another process is working on this output"):
            prune(recipe.model_copy(update={"pattern": "4:8"}), tmp_path / "out")
        refused.append(True)
        return real(*args, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(prune_module, "recover", meanwhile)
    prune(recipe, tmp_path / "out")
    assert refused
    assert json.loads((tmp_path / "out/recipe.json").read_text())["pattern"] == "2:4"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_the_end_needs_is_read_at_the_start(
    pack_tiny: Pack, how: Recovering, tiny: Path, tmp_path: Path
) -> None:
    start = Path(shutil.copytree(pack_tiny(), tmp_path / "start"))
    (start / "sparsity_report.json").unlink()
    with pytest.raises(InputError, match=r"sparsity_report\.json cannot be read"):
        recover(start, tmp_path / "out", how, tiny)
    assert [path.name for path in tmp_path.iterdir()] == ["start"]


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


def test_after_its_last_step_a_model_that_diverged_is_not_written(
    pack_tiny: Pack, how: Recovering, tmp_path: Path
) -> None:
    once = how.model_copy(update={"tokens": 4 * 32, "learning_rate": 1e30})
    with pytest.raises(InputError, match=r"diverged at step 1 .*lower --learning-rate"):
        recover(pack_tiny("wanda", "2:4"), tmp_path / "out", once)
    assert not (tmp_path / "out").exists()


def test_a_recovered_folder_is_refused(pack_tiny: Pack, how: Recovering, tmp_path: Path) -> None:
    recover(pack_tiny("wanda", "2:4"), tmp_path / "once", how)
    with pytest.raises(InputError, match="recovered already"):
        recover(tmp_path / "once", tmp_path / "twice", how)


def test_another_teacher_is_refused(pack_tiny: Pack, how: Recovering, tmp_path: Path) -> None:
    other = save_tiny_model(tmp_path / "other", intermediate_size=256)
    with pytest.raises(InputError, match="is not the dense model of"):
        recover(pack_tiny("wanda", "2:4"), tmp_path / "out", how, other)


def test_a_teacher_with_other_weights_must_be_given(
    how: Recovering, text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, packed = save_tiny_model(tmp_path / "model"), tmp_path / "packed"
    prune(Recipe(model=str(model), method="magnitude", calibration=None), packed)
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"] *= 2
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"is not as it was when .*--baseline"):
        recover(packed, tmp_path / "out", how)
    assert not run_module.work_path(tmp_path / "out").exists()
    recover(packed, tmp_path / "out", how, model)
    assert "is not as it was" in caplog.text


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
    mix = Calibration(source=f"{text_file}:1,{other}:3", num_samples=8, seq_len=16, bos=False)
    windows = text.draw(mix, tiny, tokenizer)
    digits = [tokenizer.decode(row).isdigit() for row in windows]
    assert digits == [False] * 2 + [True] * 6


@pytest.mark.parametrize("mix", ["pydoc:0", "pydoc:nan", "pydoc:-1,self:2", "pydoc,pydoc", ",", ""])
def test_a_bad_mix_is_refused(mix: str) -> None:
    with pytest.raises(UsageError, match="write sources as"):
        text.parse_mix(mix)


@pytest.fixture
def recipe(tiny: Path, text_file: Path, how: Recovering) -> Recipe:
    text = Calibration(source=str(text_file), num_samples=2, seq_len=16)
    return Recipe(model=str(tiny), method="wanda", calibration=text, recover=how)


def test_pruned_and_recovered_in_one_step_or_two_it_is_the_same(
    recipe: Recipe, how: Recovering, tmp_path: Path
) -> None:
    report = prune(recipe, tmp_path / "one")
    prune(recipe.model_copy(update={"recover": None}), tmp_path / "pruned")
    recover(tmp_path / "pruned", tmp_path / "two", how)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "pruned", "two"]
    assert report["recover"]["kept"]


def test_the_dense_model_is_opened_once_to_prune_and_recover(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, real = [], prune_module.open_job

    def counted(*args: object) -> object:
        opened.append(args)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(prune_module, "open_job", counted)
    prune(recipe, tmp_path / "out")
    assert len(opened) == 1


def test_recovery_goes_on_from_what_an_earlier_run_had_pruned(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut_off(*args: object, **given: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(prune_module, "recover", cut_off)
        with pytest.raises(KeyboardInterrupt):
            prune(recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [".out.pruned"]

    monkeypatch.setattr(prune_module, "prune_layer", cut_off)
    prune(recipe, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(KeyboardInterrupt):  # another recipe starts anew
        prune(recipe.model_copy(update={"pattern": "4:8"}), tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": "nowhere.txt"}, "nowhere.txt does not exist"),
        ({"held_out": ("pile",)}, "'pile' is neither"),
        ({"text": "pydoc:0"}, "write sources as"),
        ({"tokens": 10**14}, "GB are needed"),
    ],
)
def test_what_recovery_lacks_is_refused_before_anything_is_pruned(
    recipe: Recipe, how: Recovering, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    recipe = recipe.model_copy(update={"recover": how.model_copy(update=change)})
    for run in (prune, dry_run):
        with pytest.raises(GblmError, match=message):
            run(recipe, Output(tmp_path / "out"))
        assert not list(tmp_path.iterdir())


def test_memory_decides_what_is_trained_and_whether(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig(hidden_size=64, num_hidden_layers=2)
    extent = needs.Extent(config, [(1 << 12, 1 << 12)], 1 << 23, 1 << 24, torch.bfloat16)
    own = Recovering()
    memory = psutil.virtual_memory()

    def settled(total: int) -> str:
        has = memory._replace(total=total, available=total)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: has)
        return needs.settle(own, extent, "cpu").train

    assert settled(extent.memory(own) + 1) == "weights"
    assert settled(extent.memory(own)) == "scales"
    with pytest.raises(MachineError, match="GB are free"):
        settled(1000)
    with pytest.raises(MachineError, match="GB are free"):
        prune(recipe, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_without_a_method_the_command_prunes_and_recovers(
    gblm: Callable[..., Outcome], tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    short = ("--calibration", text_file, "--num-samples", 2, "--seq-len", 32)
    done = gblm("prune", tiny, *short, "--recover", 1024, "--output", tmp_path / "out")
    assert done.code == 0, done
    assert "8:16 or dense, int4, spread to 3.7bits, on 2 samples of 32 tokens" in done.err
    assert "recovered on 1024 tokens" in done.out
    recipe = json.loads((tmp_path / "out" / "recipe.json").read_text())
    assert (recipe["method"], recipe["values"], recipe["head"]) == ("alps", "int4:auto", "int4")
    assert recipe["recover"]["text"] == text_file.name
    done = gblm("prune", tiny, *short, "--method", "gblm", "--output", tmp_path / "paper")
    recipe = json.loads((tmp_path / "paper" / "recipe.json").read_text())
    assert (recipe["pattern"], recipe["values"], recipe["recover"]) == ("2:4", "float", None)


def test_minutes_decide_how_many_tokens_there_are(
    pack_tiny: Pack, how: Recovering, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "seconds_per_token", lambda *args: 60 / 640)
    short = recover(pack_tiny(), tmp_path / "one", how.model_copy(update={"minutes": 1.0}))
    assert short["tokens"] == len(short["losses"]) * 4 * 32 == 640
    long = recover(pack_tiny(), tmp_path / "all", how.model_copy(update={"minutes": 100.0}))
    assert long["tokens"] == how.tokens
