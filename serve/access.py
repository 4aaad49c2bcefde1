"""Check who can reach a server, by its address, ports and API key, before vLLM starts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from gblm.errors import UsageError
from gblm.network import KEY_VARIABLE, is_loopback, read_key
from gblm.serve.guard import ALWAYS_OPEN

logger = logging.getLogger(__name__)

PROXY = "deploy/nginx.conf"
ROUTE = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
# Options and variables of vLLM that open ports where nobody is asked for a key, and their values
# that open none. The engines of --data-parallel-size meet on a port of all addresses.
DOORS: dict[str, tuple[str, ...]] = {
    "--grpc": (),
    "--grpc-port": (),
    "VLLM_USE_RUST_FRONTEND": ("", "0"),
    "--kv-events-config": (),
    "--kv-transfer-config": (),
    "--ec-transfer-config": (),
    "--kv-offloading-backend": ("native",),
    "--nnodes": ("1",),
    "--data-parallel-size": ("1",),
    "--data-parallel-backend": ("mp",),
    "--distributed-executor-backend": ("mp", "uni"),
    "VLLM_DP_SIZE": ("", "1"),
}
SHORT = {"-n": "--nnodes", "-dp": "--data-parallel-size", "-dpb": "--data-parallel-backend"}
# What is wanted from its own place alone, and not among vLLM's options.
ELSEWHERE = {
    "--host": "--host before the `--`, where it is checked",
    "--config": "the options themselves, for those of a file are not checked",
    "--api-key": f"the key by --api-key-file or {KEY_VARIABLE}, where other users cannot read it",
}
# These stand in the place of the server that asks for the key, on --host.
PAST_THE_KEY = ("--grpc", "--grpc-port", "VLLM_USE_RUST_FRONTEND")


@dataclass(frozen=True)
class Server:
    """Says what to serve, where and for whom; the fields are the options of `gblm serve`.

    `folder` is one that vLLM can load, see `gblm.serve.cached.folder_to_serve`, and `name` what the
    API calls it, unless the options say otherwise; `options` go to vLLM as they are.
    """

    folder: Path
    host: str = "127.0.0.1"
    port: int = 8000
    backend: str | None = None
    name: str = "model"
    api_key_file: Path | None = None
    insecure: bool = False
    open_routes: tuple[str, ...] = ()
    max_body_size: int = 8
    shutdown_timeout: int = 30
    options: tuple[str, ...] = ()


def check_access(server: Server, environment: Mapping[str, str]) -> None:
    """Refuse a server that strangers could use; say what a key leaves open.

    Raises:
        InputError: the file with the key cannot be read.
        UsageError: other machines would get in without a key, or past it, though the user does not
            allow it; or address and key are given where they are not checked or not secret.
    """
    for word in server.options:
        for name, way in ELSEWHERE.items():
            if is_short_for(name, word):
                raise UsageError(f"{name} among vLLM's options: give {way}.")
    has_key = api_key(server.api_key_file, environment) is not None
    _check_address(server, has_key, open_paths(server.open_routes))
    for door in open_doors(server.options, environment):
        if door in PAST_THE_KEY and has_key:
            raise UsageError(
                f"{door} lets vLLM answer without asking for the API key: leave it out, or serve "
                "without a key."
            )
        if not server.insecure and not (door in PAST_THE_KEY and is_loopback(server.host)):
            raise UsageError(
                f"{door} opens ports that ask for no API key, to other machines too: leave it out, "
                "or pass --insecure if the network is yours."
            )


def _check_address(server: Server, has_key: bool, opened: Sequence[str]) -> None:
    if is_loopback(server.host):
        return
    if has_key:
        logger.info(
            "without the API key only %s are open; nothing here limits how often a client may ask, "
            "a proxy such as %s can",
            ", ".join([*ALWAYS_OPEN, *opened]),
            PROXY,
        )
    elif server.insecure:
        logger.warning("anybody who reaches %s can use it: it has no API key", server.host)
    else:
        raise UsageError(
            f"--host {server.host} opens the server to other machines without an API key: give "
            f"--api-key-file or set {KEY_VARIABLE}, or pass --insecure if the network is yours."
        )


def open_doors(options: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """List those of DOORS that vLLM's options and variables open; see `check_access`."""
    given = [*_options(options), *environment.items()]
    return [
        door
        for door, harmless in DOORS.items()
        if any(_is_for(door, name) and value.strip() not in harmless for name, value in given)
    ]


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Give each word as if it was an option, with what would be its value."""
    for word, following in pairwise([*words, ""]):
        name, equals, value = word.partition("=")
        if word[:2] == "-n" and word[2:].isdigit():  # argparse takes -n2 for -n 2
            name, equals, value = "-n", "=", word[2:]
        yield name, value if equals else following


def _is_for(option: str, name: str) -> bool:
    return name == option or SHORT.get(name) == option or is_short_for(option, name)


def is_short_for(option: str, word: str) -> bool:
    """Tell whether vLLM may take a word for an option: it allows short forms, underscores, dots."""
    name = re.split("[=.]", word)[0].replace("_", "-")
    return len(name) > 3 and option.startswith(name)


def open_paths(routes: Sequence[str]) -> list[str]:
    """List the paths that `--open-routes` names, "metrics" for "/metrics".

    Raises:
        UsageError: a name is no path.
    """
    for route in routes:
        if not ROUTE.fullmatch(route.removeprefix("/")):
            raise UsageError(f"--open-routes {route!r} is no path: give one such as metrics.")
    return [f"/{route.removeprefix('/')}" for route in routes]


def api_key(file: Path | None, environment: Mapping[str, str]) -> str | None:
    """Find the key that opens the server: that of the file, else of the variable.

    Raises:
        InputError: the file cannot be read or is empty.
    """
    return read_key(file) if file is not None else environment.get(KEY_VARIABLE) or None
