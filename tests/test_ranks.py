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
from conftest import Outcome, content

from gblm.ranks import Ranks

Launch = Callable[..., subprocess.Popen[str]]
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


def prune_arguments(
    tiny: Path, text: Path, output: Path, method: str, samples: int, *more: object
) -> list[object]:
    return [
        "prune", tiny, "--method", method, "--calibration", text, "--num-samples", samples,
        "--seq-len", 32, "--dtype", "float32", "--output", output, *more,
    ]  # fmt: skip


def finished(job: subprocess.Popen[str]) -> str:
    """What a job that must succeed says on stderr."""
    _, err = job.communicate(timeout=240)
    assert job.returncode == 0, err
    return err


def assert_same_masks(one: Path, many: Path) -> None:
    from gblm.checkpoint.packed_folder import PackedReader

    with PackedReader(one) as first, PackedReader(many) as second:
        for name in first.linears:
            a, b = first.parts(name), second.parts(name)
            assert torch.equal(a["bitmask"], b["bitmask"]), name
            torch.testing.assert_close(a["values"], b["values"], rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("method", "size", "order"),
    [("gblm", 2, "layer"), ("wanda", 3, "sequential"), ("sparsegpt", 3, "layer")],
)
def test_masks_equal_the_single_process_ones(
    gblm: Callable[..., Outcome],
    torchrun: Launch,
    tiny: Path,
    text_file: Path,
    tmp_path: Path,
    method: str,
    size: int,
    order: str,
) -> None:
    """Five samples do not divide by two or three. Sums differ in rounding, so ties could differ."""
    arguments = (tiny, text_file), (method, 5, "--order", order)
    one = gblm(*prune_arguments(*arguments[0], tmp_path / "one", *arguments[1]))
    assert one.code == 0, one
    many = torchrun(size, *prune_arguments(*arguments[0], tmp_path / "many", *arguments[1]))
    out, err = many.communicate(timeout=240)
    assert many.returncode == 0, err
    assert out.count("14 linears") == 1, out
    assert_same_masks(tmp_path / "one", tmp_path / "many")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many", "one"]


def test_gradients_streamed_layer_by_layer_give_the_single_process_masks(
    gblm: Callable[..., Outcome], torchrun: Launch, tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    one = gblm(*prune_arguments(tiny, text_file, tmp_path / "one", "gblm", 5))
    assert one.code == 0, one
    arguments = prune_arguments(tiny, text_file, tmp_path / "many", "gblm", 5)
    finished(torchrun(2, *arguments, circumstance="short_of_memory"))
    assert_same_masks(tmp_path / "one", tmp_path / "many")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["many", "one"]


@pytest.mark.parametrize(
    ("method", "values"), [("gblm", "float"), ("sparsegpt", "float"), ("sparsegpt", "int8")]
)
def test_a_killed_job_goes_on_where_it_was_and_ends_in_the_same_bytes(
    torchrun: Launch, tiny: Path, text_file: Path, tmp_path: Path, method: str, values: str
) -> None:
    whole, out = (
        [*prune_arguments(tiny, text_file, tmp_path / name, method, 5), "--values", values]
        for name in ("whole", "out")
    )
    finished(torchrun(2, *whole))
    job = torchrun(2, *out, circumstance="killed_after_one_layer")
    _, err = job.communicate(timeout=240)
    assert job.returncode != 0
    assert "SIGKILL" in err, err
    assert not (tmp_path / "out").exists()
    assert "going on after 1 finished decoder layers" in finished(torchrun(2, *out))
    assert content(tmp_path / "out") == content(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job(
    torchrun: Launch, tiny: Path, text_file: Path, tmp_path: Path, victim: int
) -> None:
    job = torchrun(2, *prune_arguments(tiny, text_file, tmp_path / "out", "gblm", 100_000))
    limit = time.monotonic() + 120
    while not (tmp_path / ".out.work/run.json").exists() and time.monotonic() < limit:
        time.sleep(0.1)
    ranks = {
        child.environ().get("RANK"): child
        for child in psutil.Process(job.pid).children(recursive=True)
        if "RANK" in child.environ()
    }
    ranks[str(victim)].kill()
    _, err = job.communicate(timeout=90)
    assert job.returncode != 0
    assert "SIGKILL" in err
    assert "gblm: error: rank" in err or "gblm: stopped by SIGTERM" in err, err
    assert not (tmp_path / "out").exists()


def test_more_ranks_than_samples_are_refused(
    torchrun: Launch, tiny: Path, text_file: Path, tmp_path: Path
) -> None:
    job = torchrun(2, *prune_arguments(tiny, text_file, tmp_path / "out", "wanda", 1))
    _, err = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "2 ranks cannot share 1 samples" in err
    assert not list(tmp_path.iterdir())


def test_samples_are_dealt_out_without_loss() -> None:
    items = list(range(7))
    dealt = [Ranks(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for part in dealt for item in part) == items
