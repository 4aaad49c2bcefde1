"""The process around vLLM: exit codes and signals, with small children in vLLM's place."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time

import psutil
import pytest

from gblm.serve.supervise import PATIENCE, patience_for

SUPERVISE = (
    "import sys; from gblm.serve.supervise import supervise\n"
    "sys.exit(supervise([sys.executable, '-c', {}]))"
)
WAIT = (
    "import signal, sys, time\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n"
    "print('ready', flush=True); time.sleep(60)"
)

COUNT = (
    "import signal, sys, time\n"
    "seen = []\n"
    "signal.signal(signal.SIGINT, lambda *_: seen.append(1))\n"
    "print('ready', flush=True)\n"
    "while not seen: time.sleep(0.05)\n"
    "time.sleep(1); print('seen', len(seen), flush=True)"
)


DEAF = (
    "import signal, subprocess, sys, time\n"
    "code = 'import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)'\n"
    "other = subprocess.Popen([sys.executable, '-c', code])\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print(other.pid, flush=True); time.sleep(60)"
)


@pytest.mark.parametrize(
    ("child", "code"),
    [("pass", 1), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", 137)],
)
def test_an_end_that_nobody_asked_for_is_an_error(child: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SUPERVISE.format(repr(child))], capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert ("vLLM ended by itself" in done.stderr) == (child == "pass")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGKILL, -9)])
def test_the_child_ends_with_its_parent(number: signal.Signals, code: int) -> None:
    words = [sys.executable, "-c", SUPERVISE.format(repr(WAIT))]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(number)
        assert process.wait(30) == code
        assert process.stdout.read() == b""  # the child held it open


def test_control_c_reaches_the_child_once() -> None:
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", SUPERVISE.format(repr(COUNT))])
    shown = b""
    while b"ready" not in shown:
        shown += os.read(terminal, 1000)
    time.sleep(0.2)
    os.write(terminal, b"\x03")
    while b"seen" not in shown or not shown.endswith(b"\n"):
        shown += os.read(terminal, 1000)
    assert b"seen 1\r\n" in shown
    os.waitpid(pid, 0)
    os.close(terminal)


def test_what_does_not_end_is_killed_with_its_children() -> None:
    watch = SUPERVISE.replace("{}])", "{}], 1)")
    words = [sys.executable, "-c", watch.format(repr(DEAF))]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        other = psutil.Process(int(process.stdout.readline()))
        process.terminate()
        _, errors = process.communicate(timeout=50)
        assert process.returncode == 137
        assert b"vLLM did not end within 1 s; killed." in errors
        assert not psutil.wait_procs([other], timeout=20)[1]


def test_patience_follows_the_last_shutdown_timeout() -> None:
    options = ["serve", "DIR", "--shutdown-timeout", "30", "--port", "1"]
    assert patience_for(options) == 30 + PATIENCE
    for later in ("--shutdown-timeout=90", "--shutdown_timeout=90", "--shutdown-t=90"):
        assert patience_for([*options, later]) == 90 + PATIENCE
