"""Run vLLM's server as a child and end as it did: `python -m gblm.serve.supervise serve DIR …`.

vLLM exits with 0 when its engine has died, and a supervisor would take that for a wanted end. This
small process passes signals on, and turns an end that no signal asked for into an error. While its
engine starts, vLLM may lose a SIGTERM or wait for ever: what does not end in time is killed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

import psutil

PR_SET_PDEATHSIG = 1
# Seconds beyond --shutdown-timeout that vLLM gets to end itself and its workers.
PATIENCE = 15


def supervise(command: list[str], patience: int = PATIENCE) -> int:
    """Run a server until it ends.

    Args:
        command: of the server.
        patience: seconds from a signal until the server and its processes are killed.

    Returns:
        The exit code: the child's own, 128 + N if signal N killed it, and 1 for an end with 0 that
        neither SIGTERM nor SIGINT asked for.
    """
    asked: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: FrameType | None) -> None:
        if not asked:
            signal.alarm(patience)
        asked.append(number)
        if number == signal.SIGINT and _in_foreground():
            return  # the terminal has sent Ctrl-C to the child, too; two would cut it short
        for child in children:
            child.send_signal(number)

    def give_up(*_: object) -> None:
        print(f"gblm: error: vLLM did not end within {patience} s; killed.", file=sys.stderr)
        for child in children:
            _kill_tree(child.pid)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    signal.signal(signal.SIGALRM, give_up)
    child = subprocess.Popen(command, preexec_fn=_die_with_parent)
    children.append(child)
    for number in tuple(asked):
        child.send_signal(number)  # came before there was a child
    code = child.wait()
    if code == 0 and not asked:
        print("gblm: error: vLLM ended by itself; the reason stands above.", file=sys.stderr)
        return 1
    return code if code >= 0 else 128 - code


def patience_for(options: list[str]) -> int:
    """Count the seconds that vLLM may take to end: the last --shutdown-timeout and PATIENCE."""
    # vLLM takes underscores and short forms.
    options = [option.replace("_", "-") for option in options]
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--shutdown-timeout", type=int, default=0)
    return int(parser.parse_known_args(options)[0].shutdown_timeout) + PATIENCE


def _kill_tree(pid: int) -> None:
    try:
        parent = psutil.Process(pid)
        family = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue


def _in_foreground() -> bool:
    """Tell whether a terminal's signals go to this process and its child."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _die_with_parent() -> None:
    """Let Linux send SIGTERM to this child when its parent is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    words = sys.argv[1:]
    server = [sys.executable, "-m", "gblm.serve.vllm_cli", *words]
    sys.exit(supervise(server, patience_for(words)))
