"""How `gblm serve` ends when it is asked to: the last test of the server that all share.

Killed it is in test_doors.py.
"""

from __future__ import annotations

import urllib.request

import faults
import psutil
import pytest

pytestmark = pytest.mark.vllm


def test_sigterm_loses_no_answer(server: tuple) -> None:
    url, process, log = server
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    found = faults.sigterm_under_load(url, process, "tiny", clients=8, tokens=200)
    assert (found["in_flight"], found["complete"]) == (8, 8)
    assert found["exit_code"] == 0, log.read_text()[-2000:]
    _, alive = psutil.wait_procs(children, timeout=20)
    assert not alive
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{url}/health", timeout=2)
