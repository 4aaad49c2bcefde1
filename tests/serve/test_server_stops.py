"""How `gblm serve` ends: killed, or asked to; the last tests of the server that all share."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import faults
import psutil
import pytest
from conftest import Pack
from vllm_server import served

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def tokens_before(server: tuple) -> list[int]:
    """Greedy tokens of the server while it lives."""
    return faults.greedy(server[0], "tiny")


@pytest.mark.usefixtures("tokens_before")
def test_a_killed_engine_turns_health_red_and_ends_the_server_with_an_error(server: tuple) -> None:
    url, process, log = server
    found = faults.kill_engine(url, process, "tiny", clients=4)
    # No clock is tested here: `make soak` measures how soon.
    assert found["health"] in (503, "closed")
    assert found["exit_code"] > 0, log.read_text()[-2000:]
    assert (found["incomplete"], found["processes_left"]) == (4, 0)


def test_after_a_restart_it_serves_as_before_and_sigterm_loses_no_answer(
    pack_tiny: Pack, tmp_path: Path, tokens_before: list[int]
) -> None:
    with served(pack_tiny(), tmp_path / "log") as (url, process, log):
        assert faults.greedy(url, "tiny") == tokens_before
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        found = faults.sigterm_under_load(url, process, "tiny", clients=8, tokens=200)
        assert (found["in_flight"], found["complete"]) == (8, 8)
        assert found["exit_code"] == 0, log.read_text()[-2000:]
        _, alive = psutil.wait_procs(children, timeout=20)
        assert not alive
        with pytest.raises(OSError, match="refused"):
            urllib.request.urlopen(f"{url}/health", timeout=2)
