"""Noise: from readings that are given, and counters as Linux shows them."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from gblm.bench import noise
from gblm.bench.noise import judge, measured, own_seconds, shares

BEFORE = {"user": 10.0, "nice": 0.0, "system": 5.0, "idle": 100.0, "iowait": 0.0, "irq": 0.0,
          "softirq": 0.0, "steal": 1.0, "guest": 3.0, "guest_nice": 0.0}  # fmt: skip


def test_shares_are_of_all_cpu_time() -> None:
    after = BEFORE | {"user": 16.0, "system": 6.0, "idle": 101.0, "steal": 3.0, "guest": 8.0}
    steal, other = shares(BEFORE, after, own=4.0)
    assert steal == pytest.approx(2 / 10)
    assert other == pytest.approx((6 + 1 - 4) / 10)


def test_rounding_of_our_own_time_is_no_negative_load() -> None:
    after = BEFORE | {"user": 11.0, "idle": 101.0}
    assert shares(BEFORE, after, own=1.5) == (0.0, 0.0)
    assert shares(BEFORE, BEFORE, own=0.0) == (0.0, 0.0)


SPIN = "import time\nwhile time.process_time() < 0.3: pass\n"


def test_children_count_as_ours_while_they_live_and_when_they_have_ended() -> None:
    before = own_seconds(())
    subprocess.run([sys.executable, "-c", SPIN], check=True)
    assert own_seconds(()) - before >= 0.3
    waiting = f"{SPIN}print('spun', flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", waiting], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as child:  # fmt: skip
        assert child.stdout is not None
        child.stdout.readline()
        assert own_seconds([psutil.Process(child.pid)]) - own_seconds(()) >= 0.25
        child.communicate(b"\n")


def test_what_was_not_checked_is_said() -> None:
    with measured() as found:
        pass
    assert set(found) == {"steal", "other_load"}
    assert len(noise.unchecked([found])) == 1
    assert noise.unchecked([found, {"read_limit_gb_s": 9.0}]) == []


QUIET = {"steal": 0.0, "other_load": 0.01, "read_limit_gb_s": 20.0}


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"steal": 0.05}, "5.0% of the CPU time was stolen"),
        ({"other_load": 0.25}, "25.0% of the CPU time went to other processes"),
        ({"read_limit_gb_s": 16.9}, "memory was read at 16.9 GB/s, 20.0 GB/s in the best rounds"),
    ],
)
def test_a_round_is_noisy_for_one_reason(changed: dict[str, float], sentence: str) -> None:
    rounds = [{"a": QUIET, "b": QUIET}, {"a": QUIET, "b": QUIET | changed}]
    kept, (note,), reasons = judge("load", rounds)
    assert (kept, reasons) == ([0], [])
    assert note.startswith(f"load: round 2 is left out: b: {sentence}")


def test_one_burst_makes_no_other_round_noisy() -> None:
    reads = (13.0, 14.0, 18.3, 13.5, 14.2, 11.8)
    rounds = [{"a": QUIET | {"read_limit_gb_s": read}} for read in reads]
    kept, (note,), reasons = judge("load", rounds)
    assert (kept, reasons) == ([0, 1, 2, 3, 4], [])
    assert "memory was read at 11.8 GB/s, 14.2 GB/s in the best rounds" in note


def test_quiet_rounds_are_kept_and_noise_can_be_allowed() -> None:
    heard = QUIET | {"steal": 0.05, "other_load": 0.25, "read_limit_gb_s": 17.1}
    assert judge("load", [{"a": QUIET}, {"a": QUIET}]) == ([0, 1], [], [])
    kept, (note,), reasons = judge("load", [{"a": QUIET}, {"a": heard}], allow_noise=True)
    assert (kept, reasons) == ([0, 1], [])
    assert note.startswith("load: round 2 is noisy: a: 5.0% of the CPU time was stolen")
