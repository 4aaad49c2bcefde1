"""`gblm serve` as a process: the official client, streaming, what it refuses."""

from __future__ import annotations

import http.client
import subprocess
import sys
from pathlib import Path

import bad_requests
import faults
import pytest
from conftest import Pack
from vllm_server import listening

from gblm.bench.server import free_port
from gblm.evaluate.perplexity import Protocol
from gblm.evaluate.run import Evaluation, run_evaluation
from gblm.network import is_loopback

pytestmark = pytest.mark.vllm


def test_chat_template_and_generation_settings_are_the_folders(
    client: object, server: tuple
) -> None:
    ask = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    messages = [{"role": "user", "content": "hello"}]
    done = client.chat.completions.create(messages=messages, **ask)
    plain = client.completions.create(prompt="[user]hello", **ask)
    assert done.choices[0].message.role == "assistant"
    assert done.choices[0].message.content == plain.choices[0].text
    assert done.usage.prompt_tokens == plain.usage.prompt_tokens == len("[user]hello")
    tools = [{"type": "function", "function": {"name": "look"}}]
    done = client.chat.completions.create(messages=messages, tools=tools, tool_choice="none", **ask)
    assert done.usage.prompt_tokens == len("1 tools")
    assert "`{'top_k': 7}`" in server[2].read_text()  # what requests take that do not say


def test_streaming_gives_the_same_text(client: object, server: tuple, best_backend: str) -> None:
    ask = {"model": "tiny", "prompt": "abc", "max_tokens": 6, "temperature": 0}
    whole = client.completions.create(**ask)
    assert whole.usage.completion_tokens == 6
    pieces = [part.choices[0].text for part in client.completions.create(stream=True, **ask)]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].text
    state = "expanded at load" if best_backend == "dense" else "packed in memory"
    line = f"8 linears run on backend {best_backend} ({state})"
    assert line in server[2].read_text()


def test_eval_scores_the_running_server(
    server: tuple, pack_tiny: Pack, tiny: Path, text_file: Path
) -> None:
    protocol = Protocol(str(text_file), 64, 2)
    pytest.importorskip("tenacity", reason="lm-eval[api]: make dev installs it")
    record = run_evaluation(Evaluation(server[0], (protocol,)))
    own = run_evaluation(Evaluation(str(pack_tiny()), (protocol,)))
    assert [record.rows[0].side, record.baseline] == ["tiny", "tiny, baseline"]
    ours, theirs = ({row.metric: row.value for row in found.rows if row.side == side}
                    for found, side in ((record, "tiny"), (own, pack_tiny().name)))  # fmt: skip
    # bfloat16 on both sides, other kernels.
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=0.02)
    assert ours["drift_mean"] == pytest.approx(theirs["drift_mean"], rel=0.05)
    # Again, though the prompts are cached by now.
    assert run_evaluation(Evaluation(server[0], (protocol,))).rows[0].value == ours["perplexity"]


def test_nothing_beside_the_server_listens_to_other_machines(server: tuple) -> None:
    found = listening(server[1])
    assert ("127.0.0.1", int(server[0].rpartition(":")[2])) in found
    assert all(is_loopback(host) for host, _ in found)


def test_a_port_without_the_key_is_refused_before_one_is_opened(
    pack_tiny: Pack, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("secret")
    words = [sys.executable, "-m", "gblm", "serve", pack_tiny(), "--port", str(free_port()),
             "--api-key-file", tmp_path / "key", "--", "--grpc"]  # fmt: skip
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    opened = set()
    while process.poll() is None:
        opened |= listening(process)
    assert process.stderr is not None
    with process.stderr as stream:
        said = stream.read().decode()
    assert (process.returncode, opened) == (2, set()), said
    assert said.startswith("gblm: error: --grpc lets vLLM answer without asking for the API key")
    assert said.count("\n") == 1


def test_bodies_beyond_the_limit_are_refused_unread(server: tuple) -> None:
    connection = http.client.HTTPConnection(server[0].removeprefix("http://"), timeout=60)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Length", str((8 << 20) + 1))
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, b"more than 8388608 bytes" in answer.read()) == (413, True)
    connection.close()


def test_clients_that_hang_up_take_nothing_from_the_others(server: tuple) -> None:
    before = faults.greedy(server[0], "tiny")
    found = faults.abort_storm(server[0], "tiny", clients=8, tokens=100)
    assert (found["hung_up"], found["stayed_complete"], found["running_after"]) == (4, 4, 0)
    assert faults.greedy(server[0], "tiny") == before


def test_bad_requests_are_refused_and_change_nothing_for_others(server: tuple) -> None:
    bad = bad_requests.bad_requests("tiny", context=256)
    before = faults.greedy(server[0], "tiny")
    for one in bad:
        statuses = bad_requests.refuse_all(server[0], [one])
        assert statuses[one.name] in bad_requests.REFUSED, one.name
        assert faults.greedy(server[0], "tiny") == before, one.name
    storm = bad_requests.bad_storm(server[0], bad, at_once=16, rounds=2)
    assert len(storm) == 2 * len(bad)
    assert all(status in bad_requests.REFUSED for status in storm)
    assert faults.greedy(server[0], "tiny") == before
