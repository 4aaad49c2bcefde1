"""Addresses and keys of `gblm serve`; nothing here starts vLLM."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

from gblm.errors import UsageError
from gblm.network import is_loopback
from gblm.serve.access import DOORS, PAST_THE_KEY, SHORT, Server, check_access, open_doors

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("", False), ("192.168.0.7", False), ("box", False)],
)  # fmt: skip
def test_which_addresses_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def check(
    *words: str, host: str = "127.0.0.1", key: bool = True, insecure: bool = False,
    routes: tuple[str, ...] = (), **variables: str,
) -> None:  # fmt: skip
    server = Server(Path("m"), host, insecure=insecure, open_routes=routes, options=words)
    check_access(server, variables | ({"VLLM_API_KEY": "secret"} if key else {}))


def refuses(*words: str, **given: Any) -> bool:
    """Whether vLLM's options open a door past the key."""
    try:
        check(*words, **given)
    except UsageError:
        return True
    return False


def test_other_machines_need_a_key_or_insecure(caplog: pytest.LogCaptureFixture) -> None:
    check(key=False)
    assert not caplog.records
    with pytest.raises(UsageError, match=r"without an API key: give --api-key-file"):
        check(host="0.0.0.0", key=False)
    with caplog.at_level(logging.WARNING):
        check(host="0.0.0.0")
        assert not caplog.records
        check(host="0.0.0.0", key=False, insecure=True)
        assert "no API key" in caplog.text
    with caplog.at_level(logging.INFO):
        check(host="0.0.0.0", routes=("metrics",))
    assert "only /health, /ping, /metrics are open" in caplog.text
    assert "deploy/nginx.conf" in caplog.text


@pytest.mark.parametrize(
    ("word", "way"),
    [("--host", "before the `--`"), ("--host=0.0.0.0", "before the `--`"),
     ("--hos", "before the `--`"), ("--config", "the options themselves"),
     ("--api-key", "--api-key-file or VLLM_API_KEY"),
     ("--api_key=x", "--api-key-file or VLLM_API_KEY"), ("--api-k", "where other users cannot")],
)  # fmt: skip
def test_what_has_another_place_is_refused_among_vllms_options(word: str, way: str) -> None:
    with pytest.raises(UsageError, match=way):
        check(word, "x")
    check("--config-format", "hf", "--hf-overrides", "--h11-max-header-count=9")
    check("--api-server-count", "2")


@pytest.mark.parametrize(
    "words",
    [("--grpc",), ("--grpc=true",), ("--grpc.x=1",), ("--gr",), ("--grpc-port", "9"),
     ("--grpc_port=9",)],
)  # fmt: skip
def test_servers_past_the_key_are_refused_beside_one(words: tuple[str, ...]) -> None:
    assert refuses(*words)
    assert refuses(*words, insecure=True)
    assert refuses(*words, host="::", key=False)
    assert not refuses(*words, key=False)
    assert not refuses(*words, host="::", key=False, insecure=True)


@pytest.mark.parametrize(
    "words",
    [("--kv-events-config", "{}"), ("--kv_events_config.publisher=zmq",), ("--kv-e={}",),
     ("--kv-transfer-config", "{}"), ("--ec-transfer-config={}",), ("--nnodes", "2"), ("-n2",),
     ("-n=2",), ("--data-parallel-size=2",), ("-dp", "2"), ("--data_parallel_size", "4"),
     ("--distributed-executor-backend", "ray"), ("-dpb=ray",), ("--kv-offloading-b", "lmcache"),
     ("--data-parallel-size", "1", "-dp", "2")],
)  # fmt: skip
def test_ports_between_machines_need_a_network_of_ones_own(words: tuple[str, ...]) -> None:
    for key in (True, False):
        assert refuses(*words, key=key)  # whatever --host says, they listen elsewhere
        assert not refuses(*words, host="::", key=key, insecure=True)


@pytest.mark.parametrize(
    "words",
    [("--nnodes=1",), ("-n", "1"), ("--data-parallel-size", "1"), ("-tp", "2"), ("--uds", "x"),
     ("--distributed-executor-backend", "mp"), ("--kv-offloading-backend", "native"),
     ("--kv-cache-dtype", "auto"), ("--data-parallel-rpc-port", "2"), ("--node-rank", "0")],
)  # fmt: skip
def test_what_listens_on_this_machine_alone_is_no_door(words: tuple[str, ...]) -> None:
    assert not refuses(*words, host="::")


def test_variables_that_open_a_door_are_refused() -> None:
    for value in ("1", "2"):
        assert refuses(host="::", VLLM_USE_RUST_FRONTEND=value, insecure=True)
        assert not refuses(key=False, VLLM_USE_RUST_FRONTEND=value)
    assert refuses(VLLM_DP_SIZE="2")
    assert not refuses(host="::", VLLM_USE_RUST_FRONTEND=" 0", VLLM_DP_SIZE="1")
    with pytest.raises(UsageError, match="VLLM_DP_SIZE opens ports that ask for no API key"):
        check(host="::", VLLM_DP_SIZE="2")


@pytest.mark.vllm
def test_doors_are_found_as_vllm_parses_them() -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(exit_on_error=False))
    names = {name for action in parser._actions for name in action.option_strings}
    doors = {door for door in DOORS if door.startswith("--")}
    assert names >= doors
    assert {name for name in names if open_doors([name, "x"], {})} == doors | SHORT.keys()
    for door in doors:
        (action,) = (a for a in parser._actions if door in a.option_strings)
        assert {s for s in action.option_strings if s in SHORT} == {
            short for short, long in SHORT.items() if long == door
        }
        for length in range(3, len(door)):
            found = parser._get_option_tuples(door[:length])
            assert door in open_doors([door[:length], "x"], {}) or len(found) > 1, door[:length]


@pytest.mark.vllm
def test_every_door_is_listed_in_the_docs_and_known_to_vllm() -> None:
    from vllm import envs

    text = (ROOT / "docs" / "serving.md").read_text()
    for door in DOORS:
        assert f"`{door}" in text, door
        assert door.startswith("--") or door in envs.environment_variables
    assert DOORS.keys() > {*PAST_THE_KEY}


@pytest.mark.vllm
def test_serve_refuses_before_it_looks_for_the_model(gblm: Run) -> None:
    done = gblm("serve", "./nowhere", "--host", "0.0.0.0", VLLM_API_KEY="")
    assert done.code == 2, done
    assert "--insecure" in done.err
