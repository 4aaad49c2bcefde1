"""Several processes under torchrun: the same masks as one process, and no hang when one dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from conftest import Run, content
from safetensors.torch import load_file
from test_families import save_family
from weights import stored

from gblm.calibrate.ranks import Ranks, rank_device
from gblm.errors import UsageError
from gblm.packed import load_any
from gblm.prune import prune
from gblm.prune.job import open_job
from gblm.recipe import Calibration, Recipe

pytestmark = pytest.mark.usefixtures("own_cpu")

Launch = Callable[..., subprocess.Popen[str]]
Words = Callable[..., list[object]]
RANK = str(Path(__file__).with_name("rank.py"))


@pytest.fixture
def torchrun(tmp_path: Path) -> Launch:
    def launch(
        num_processes: int, *arguments: object, circumstance: str = ""
    ) -> subprocess.Popen[str]:
        program = (RANK, circumstance) if circumstance else ("-m", "gblm")
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(num_processes), *program, *map(str, arguments)),
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
            env=environment,
        )  # fmt: skip

    return launch


@pytest.fixture
def words(tiny: Path, text_file: Path, tmp_path: Path) -> Callable[..., list[object]]:
    """The arguments of a run whose output is a folder of this name."""

    def make(name: str, method: str, samples: int, *more: object) -> list[object]:
        return [
            "prune", tiny, "--method", method, "--calibration", text_file, "--num-samples", samples,
            "--seq-len", 32, "--dtype", "float32", "--output", tmp_path / name, *more,
        ]  # fmt: skip

    return make


def finished(job: subprocess.Popen[str]) -> str:
    """What a job that must succeed says on stderr."""
    _, err = job.communicate(timeout=240)
    assert job.returncode == 0, err
    return err


def assert_same_masks(one: Path, many: Path, flips: float = 0.0) -> None:
    """Up to `flips` of a linear's mask may differ; values are compared where no bit does."""
    other = stored(many)
    for name, (_, a) in stored(one).items():
        b = other[name][1]
        differing = float((a.mask != b.mask).float().mean())
        assert differing <= flips, (name, differing)
        if not differing:
            torch.testing.assert_close(a.weight, b.weight, rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "size", "order", "flips"),
    [
        ("gblm", 2, "layer", 0.0),
        # One tie that falls otherwise moves all weights behind it, which makes new ties.
        pytest.param("sparsegpt", 3, "sequential", 0.001, marks=pytest.mark.slow),
    ],
)
def test_masks_equal_the_single_process_ones(
    gblm: Run, torchrun: Launch, words: Words, tmp_path: Path, method: str, size: int, order: str,
    flips: float,
) -> None:  # fmt: skip
    """Five samples do not divide by two or three. Sums differ in rounding, so ties could differ."""
    one = gblm(*words("one", method, 5, "--order", order))
    assert one.code == 0, one
    many = torchrun(size, *words("many", method, 5, "--order", order))
    out, err = many.communicate(timeout=240)
    assert many.returncode == 0, err
    assert out.count("14 linears") == 1, out
    assert_same_masks(tmp_path / "one", tmp_path / "many", flips)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many", "one"]


@pytest.mark.slow
def test_gradients_from_inputs_on_disk_give_the_single_process_masks(
    gblm: Run, torchrun: Launch, words: Words, tmp_path: Path
) -> None:
    one = gblm(*words("one", "gblm", 5))
    assert one.code == 0, one
    finished(torchrun(2, *words("many", "gblm", 5), circumstance="short_of_memory"))
    assert_same_masks(tmp_path / "one", tmp_path / "many")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many", "one"]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["layer", "sequential"])
def test_ranks_whose_texts_reach_other_experts_wait_for_none(
    gblm: Run, torchrun: Launch, words: Words, text_file: Path, tmp_path: Path, order: str
) -> None:
    """Seven tokens a sample, and one sample a rank: most of the 16 experts see none of a rank's."""
    model = save_family("mixtral", tmp_path / "model", num_local_experts=16)
    one, many = (
        ["prune", model, *words(name, "gblm", 2, "--seq-len", 7, "--order", order)[2:]]
        for name in ("one", "many")
    )
    assert gblm(*one).code == 0
    finished(torchrun(2, *many))
    assert_same_masks(tmp_path / "one", tmp_path / "many")
    how = ("--text", text_file, "--held-out", text_file, "--tokens", 256, "--seq-len", 16)
    finished(
        torchrun(2, "recover", tmp_path / "many", "--output", tmp_path / "better", *how)
    )  # fmt: skip
    masks = stored(tmp_path / "many")
    for name, (_, weight) in stored(tmp_path / "better").items():
        assert torch.equal(weight.mask, masks[name][1].mask)


# Every step of a recipe; two passes over the text.
STEPS = ("--values", "int4", "--rounding", "obs", "--refit", "--reconstruct", 2,
         "--order", "sequential")  # fmt: skip


@pytest.mark.slow
def test_training_takes_the_steps_of_a_single_process(
    gblm: Run, torchrun: Launch, words: Words, tiny: Path, tmp_path: Path
) -> None:
    """All samples are in one step, so the mean of the ranks' gradients is that of one process."""
    more = ("--order", "layer", "--values", "int4", "--reconstruct", 2)
    assert gblm(*words("one", "wanda", 4, *more)).code == 0
    finished(torchrun(2, *words("many", "wanda", 4, *more)))
    source = load_file(tiny / "model.safetensors")
    one, many = (stored(tmp_path / name, torch.float32) for name in ("one", "many"))
    for name, (_, a) in one.items():
        b = many[name][1]
        assert torch.equal(a.mask, b.mask), name
        cut = torch.where(a.mask, source[f"{name}.weight"].float(), 0)
        moved = (a.weight - cut).norm()
        assert float((a.weight - b.weight).norm()) < 0.1 * float(moved), name
        assert float(moved) > 0


@pytest.mark.slow
def test_all_steps_of_several_ranks_end_as_close_to_the_dense_model(
    torchrun: Launch, words: Words, tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    """Conjugate gradients amplify the rounding of sums: weights differ, their errors do not."""
    text = Calibration(source=str(text_file), num_samples=4, seq_len=32, order="sequential")
    recipe = Recipe(
        model=str(tiny), method="sparsegpt", values="int4", dtype="float32", calibration=text
    )
    fields = {"rounding": "obs", "refit": {}, "reconstruct": {}}
    prune(Recipe.from_dict(recipe.to_dict() | fields), tmp_path / "one")
    finished(torchrun(2, *words("many", "sparsegpt", 4, *STEPS)))
    ids = torch.tensor(list(text_file.read_bytes()[: 8 * 32])).reshape(8, 32)

    @torch.no_grad()
    def logits(folder: Path) -> torch.Tensor:
        return load_any(folder, None, torch.float32)(input_ids=ids).logits

    want = logits(tiny)
    one, many = ((logits(tmp_path / name) - want).square().mean() for name in ("one", "many"))
    assert float(many) == pytest.approx(float(one), rel=0.1)


def assert_ended_by_a_lost_rank(job: subprocess.Popen[str], out: Path) -> None:
    _, err = job.communicate(timeout=240)
    assert job.returncode != 0
    assert "SIGKILL" in err, err
    assert "gblm: error: rank" in err or "gblm: stopped by SIGTERM" in err, err
    assert not out.exists()


@pytest.mark.slow
def test_a_killed_job_goes_on_where_it_was_and_ends_in_the_same_bytes(
    torchrun: Launch, words: Words, tmp_path: Path
) -> None:
    """Rank 0 is killed, with gradients and every step of a recipe."""
    finished(torchrun(2, *words("whole", "gblm", 5, *STEPS)))
    out = words("out", "gblm", 5, *STEPS)
    job = torchrun(2, *out, circumstance="killed_after_one_layer")
    assert_ended_by_a_lost_rank(job, tmp_path / "out")
    assert "going on after 1 finished decoder layers" in finished(torchrun(2, *out))
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.slow
def test_another_rank_that_is_killed_ends_the_job(
    torchrun: Launch, words: Words, tmp_path: Path
) -> None:
    job = torchrun(2, *words("out", "gblm", 100_000))
    limit = time.monotonic() + 120
    while not (tmp_path / ".out.work/run.json").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    ranks = {
        child.environ().get("RANK"): child
        for child in psutil.Process(job.pid).children(recursive=True)
        if "RANK" in child.environ()
    }
    ranks["1"].kill()
    assert_ended_by_a_lost_rank(job, tmp_path / "out")


def test_more_ranks_than_samples_are_refused(tiny: Path) -> None:
    recipe = Recipe(model=str(tiny), method="wanda", calibration=Calibration(num_samples=1))
    refused = pytest.raises(UsageError, match="2 ranks cannot share 1 samples")
    with refused, open_job(recipe, Ranks(0, 2)):
        pass


def test_samples_are_dealt_out_without_loss() -> None:
    items = list(range(7))
    dealt = [Ranks(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for part in dealt for item in part) == items


def test_each_rank_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [rank_device(name) for name in ("cpu", "cuda", "cuda:1")] == ["cpu", "cuda", "cuda:1"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [rank_device(name) for name in ("cpu", "cuda")] == ["cpu", "cuda:2"]
    with pytest.raises(UsageError, match=r"cuda:1 under torchrun: say cuda"):
        rank_device("cuda:1")
