"""Addresses and keys of `gblm serve`; nothing here starts vLLM."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from conftest import Run

from gblm.errors import InputError, UsageError
from gblm.network import is_loopback
from gblm.serve.access import (
    DOORS,
    RUST_VARIABLE,
    api_keys,
    check_address,
    check_doors,
    with_config,
)
from gblm.serve.launch import Server, check_options, environment


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("", False), ("192.168.0.7", False), ("box", False)],
)  # fmt: skip
def test_which_addresses_only_this_machine_reaches(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_other_machines_need_a_key_or_insecure(caplog: pytest.LogCaptureFixture) -> None:
    check_address("127.0.0.1", has_key=False, insecure=False)
    assert not caplog.records
    with pytest.raises(UsageError, match=r"without an API key: give --api-key-file"):
        check_address("0.0.0.0", has_key=False, insecure=False)
    with caplog.at_level(logging.WARNING):
        check_address("0.0.0.0", has_key=True, insecure=False)
        assert not caplog.records
        check_address("0.0.0.0", has_key=True, insecure=False, routes=("all",))
        assert "/v1 only" in caplog.text
        assert "deploy/nginx.conf" in caplog.text
        caplog.clear()
        check_address("0.0.0.0", has_key=False, insecure=True)
        assert "no API key" in caplog.text
    with caplog.at_level(logging.INFO):
        check_address("0.0.0.0", has_key=True, insecure=False, routes=("metrics",))
    assert "only /health, /ping, /metrics are open" in caplog.text


@pytest.mark.parametrize("word", ["--host", "--host=0.0.0.0", "--hos"])
def test_an_address_among_vllms_options_is_refused(word: str) -> None:
    with pytest.raises(UsageError, match="before the `--`"):
        check_address("127.0.0.1", True, False, (word, "0.0.0.0"))
    check_address("127.0.0.1", True, False, ("--hf-overrides", "--h11-max-header-count=9"))


def refuses(*words: str, host: str = "127.0.0.1", key: bool = True, insecure: bool = False) -> bool:
    """Whether vLLM's options open a door past the key."""
    try:
        check_doors(host, key, insecure, words, {})
    except UsageError:
        return True
    return False


@pytest.mark.parametrize(
    "words",
    [("--grpc",), ("--grpc=true",), ("--grpc.x=1",), ("--gr",), ("--grpc-port", "9"),
     ("--grpc_port=9",), ("--kv-events-config", "{}"), ("--kv_events_config.publisher=zmq",),
     ("--kv-e={}",)],
)  # fmt: skip
def test_ports_that_ask_for_no_key_are_refused_beside_one(words: tuple[str, ...]) -> None:
    assert refuses(words[0])
    assert refuses(words[0], host="::", key=False)
    for asked in ({"key": False, "insecure": True}, {"key": False, "host": "::", "insecure": True}):
        assert not refuses(*words, **asked)
    # Whatever --host says, key-value events go out on every address.
    assert refuses(words[0], key=False) is words[0].startswith("--kv")


def test_the_frontend_without_middleware_is_refused_beside_a_key() -> None:
    for value in ("1", "2"):
        with pytest.raises(UsageError, match=f"{RUST_VARIABLE}={value} puts another server"):
            check_doors("::", True, False, (), {RUST_VARIABLE: value})
        check_doors("127.0.0.1", False, False, (), {RUST_VARIABLE: value})
    check_doors("::", True, False, (), {RUST_VARIABLE: "0"})


CONFIG = """
grpc: {}
seed: 3
api-key: [first, second]
served-model-name: name
enforce-eager: true
compilation-config: []
"""


@pytest.mark.vllm
def test_doors_and_keys_are_found_as_vllm_parses_them(tmp_path: Path) -> None:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(exit_on_error=False))
    names = {name for action in parser._actions for name in action.option_strings}
    assert names >= DOORS.keys()
    assert {name for name in names if refuses(name)} == DOORS.keys()
    for door in DOORS:
        for length in range(3, len(door)):
            found = parser._get_option_tuples(door[:length])
            assert refuses(door[:length]) or len(found) > 1, door[:length]
    for value, refused in (("true", True), ("yes", True), ("false", False), ("--grpc", True)):
        path = tmp_path / "vllm.yaml"
        path.write_text(CONFIG.format(value))
        words = with_config(["--config", str(path)])
        assert words == [*parser.load_config_file(str(path)), "--config", str(path)]
        assert any(refuses(word) for word in words) is refused
        assert api_keys(None, words, {}) == ["first", "second"]


def test_a_configuration_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for content in (None, "", "[1", "- grpc"):
        if content is not None:
            (tmp_path / "c.yaml").write_text(content)
        with pytest.raises(InputError, match=r"--config .*c\.yaml is no readable YAML"):
            with_config(["--config", str(tmp_path / "c.yaml")])
    assert with_config(["--config"]) == ["--config"]  # vLLM says what it lacks


@pytest.mark.vllm
def test_every_way_to_give_a_key_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    (tmp_path / "key").write_text("secret")
    check_options(Server(tmp_path, host="::", api_key_file=tmp_path / "key"))
    check_options(Server(tmp_path, host="::", options=("--api-key", "secret")))
    with pytest.raises(UsageError, match="without an API key"):
        check_options(Server(tmp_path, host="::"))
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    check_options(Server(tmp_path, host="::"))
    with pytest.raises(InputError, match="cannot be read"):
        check_options(Server(tmp_path, host="::", api_key_file=tmp_path / "none"))


@pytest.mark.vllm
def test_serve_refuses_before_it_looks_for_the_model(gblm: Run) -> None:
    done = gblm("serve", "./nowhere", "--host", "0.0.0.0", VLLM_API_KEY="")
    assert done.code == 2, done
    assert "--insecure" in done.err


def test_a_request_may_ask_for_few_answers_only(tmp_path: Path) -> None:
    assert environment(Server(tmp_path), {})["VLLM_MAX_N_SEQUENCES"] == "64"
    mine = environment(Server(tmp_path), os.environ | {"VLLM_MAX_N_SEQUENCES": "8"})
    assert mine["VLLM_MAX_N_SEQUENCES"] == "8"
