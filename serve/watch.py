"""Run vLLM's server as a child and end as it did: `python -m gblm.serve.watch serve DIR …`.

vLLM exits with 0 when its engine has died, and a supervisor would take that for a wanted end. This
small process passes signals on, and turns an end that no signal asked for into an error.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from types import FrameType

PR_SET_PDEATHSIG = 1


def watch(command: list[str]) -> int:
    """Run a server until it ends.

    Returns:
        The exit code: the child's own, 128 + N if signal N killed it, and 1 for an end with 0 that
        neither SIGTERM nor SIGINT asked for.
    """
    asked: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _: FrameType | None) -> None:
        asked.append(number)
        if number == signal.SIGINT and _in_foreground():
            return  # the terminal has sent Ctrl-C to the child, too; two would cut it short
        for child in children:
            child.send_signal(number)

    signal.signal(signal.SIGTERM, forward)
    signal.signal(signal.SIGINT, forward)
    child = subprocess.Popen(command, preexec_fn=_die_with_parent)
    children.append(child)
    for number in tuple(asked):
        child.send_signal(number)  # came before there was a child
    code = child.wait()
    if code == 0 and not asked:
        print("gblm: error: vLLM ended by itself; the reason stands above.", file=sys.stderr)
        return 1
    return code if code >= 0 else 128 - code


def _in_foreground() -> bool:
    """Whether a terminal's signals go to this process and its child."""
    try:
        return os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False


def _die_with_parent() -> None:
    """Linux: a child whose parent is killed gets SIGTERM."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(watch([sys.executable, "-m", "gblm.serve.vllm_cli", *sys.argv[1:]]))
