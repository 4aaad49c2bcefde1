"""Check who can reach a server, by its address, ports and API key, before vLLM starts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
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


def check_address(
    host: str, has_key: bool, insecure: bool, options: Sequence[str], opened: Sequence[str]
) -> None:
    """Refuse a server that strangers could use; say what a key leaves open.

    Args:
        host: address to bind.
        has_key: whether there is an API key.
        insecure: whether the user allows other machines without one.
        options: vLLM's own.
        opened: see `open_paths`.

    Raises:
        UsageError: the address is not this machine's own and there is no key; or one of them is
            given where it would not be checked, or where others can read it.
    """
    for word in options:
        for name, way in ELSEWHERE.items():
            if _is_short_for(name, word):
                raise UsageError(f"{name} among vLLM's options: give {way}.")
    if is_loopback(host):
        return
    if has_key:
        logger.info(
            "without the API key only %s are open; nothing here limits how often a client may ask, "
            "a proxy such as %s can",
            ", ".join([*ALWAYS_OPEN, *opened]),
            PROXY,
        )
    elif insecure:
        logger.warning("anybody who reaches %s can use this server: it has no API key", host)
    else:
        raise UsageError(
            f"--host {host} opens the server to other machines without an API key: give "
            f"--api-key-file or set {KEY_VARIABLE}, or pass --insecure if the network is yours."
        )


def check_doors(
    host: str, has_key: bool, insecure: bool, options: Sequence[str], environment: Mapping[str, str]
) -> None:
    """Refuse what makes vLLM listen where nobody is asked for the API key.

    Args:
        host: address to bind.
        has_key: whether there is an API key.
        insecure: whether the user allows other machines without one.
        options: vLLM's own.
        environment: of vLLM.

    Raises:
        UsageError: clients would get past a key; or other machines would get in though `insecure`
            is not set.
    """
    for door in open_doors(options, environment):
        if door in PAST_THE_KEY and has_key:
            raise UsageError(
                f"{door} lets vLLM answer without asking for the API key: leave it out, or serve "
                "without a key."
            )
        if not insecure and not (door in PAST_THE_KEY and is_loopback(host)):
            raise UsageError(
                f"{door} opens ports that ask for no API key, to other machines too: leave it out, "
                "or pass --insecure if the network is yours."
            )


def open_doors(options: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """List those of DOORS that vLLM's options and variables open; see `check_doors`."""
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
    return name == option or SHORT.get(name) == option or _is_short_for(option, name)


def _is_short_for(option: str, word: str) -> bool:
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
