"""Who can reach the server: its address, its ports and its API key, checked before vLLM starts."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from gblm.errors import InputError, UsageError
from gblm.network import KEY_VARIABLE, is_loopback, read_key
from gblm.serve.guard import ALWAYS_OPEN, EVERY_ROUTE, settings

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
# These stand in the place of the server that asks for the key, on --host.
PAST_THE_KEY = ("--grpc", "--grpc-port", "VLLM_USE_RUST_FRONTEND")


def check_address(
    host: str,
    has_key: bool,
    insecure: bool,
    options: Sequence[str] = (),
    routes: Sequence[str] = (),
) -> None:
    """Refuse a server that strangers could use; say what a key leaves open.

    Args:
        host: address to bind.
        has_key: whether there is an API key.
        insecure: whether the user allows other machines without one.
        options: vLLM's own.
        routes: see `open_paths`.

    Raises:
        UsageError: the address is not this machine's own and there is no key, or it is given where
            it would not be checked.
    """
    for word in options:
        if _is_short_for("--host", word):
            raise UsageError(f"{word}: give --host before the `--`, where it is checked.")
    opened = open_paths(routes)
    if is_loopback(host):
        return
    if has_key and EVERY_ROUTE in routes:
        logger.warning(
            "the API key covers vLLM's routes under /v1 only: put a proxy with an allow list, such "
            "as %s, between this server and a network you do not trust",
            PROXY,
        )
    elif has_key:
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
    host: str, has_key: bool, insecure: bool, words: Sequence[str], environment: Mapping[str, str]
) -> None:
    """Refuse what makes vLLM listen where nobody is asked for the API key.

    Args:
        host: address to bind.
        has_key: whether there is an API key.
        insecure: whether the user allows other machines without one.
        words: vLLM's options, see `with_config`.
        environment: of vLLM.

    Raises:
        UsageError: clients would get past a key; or other machines would get in though `insecure`
            is not set.
    """
    for door in open_doors(words, environment):
        if door in PAST_THE_KEY and has_key:
            raise UsageError(
                f"{door} lets vLLM answer without asking for the API key: leave it out, of a "
                "--config file, too, or serve without a key."
            )
        if not insecure and not (door in PAST_THE_KEY and is_loopback(host)):
            raise UsageError(
                f"{door} opens ports that ask for no API key, to other machines too: leave it out, "
                "of a --config file, too, or pass --insecure if the network is yours."
            )


def open_doors(words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """List those of DOORS that vLLM's options and variables open; see `check_doors`."""
    given = [*_options(words), *environment.items()]
    return [
        door
        for door, harmless in DOORS.items()
        if any(_is_for(door, name) and value.strip() not in harmless for name, value in given)
    ]


def with_config(options: Sequence[str]) -> list[str]:
    """Put vLLM's options behind those that it reads from the file of `--config`.

    Raises:
        InputError: the file cannot be read, or is no YAML with options.
    """
    words = list(options)
    if "--config" not in words[:-1]:
        return words
    path = Path(words[words.index("--config") + 1])
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8")).items()
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise InputError(
            f"--config {path} is no readable YAML file of options: {error}."
        ) from error
    return [word for key, value in found for word in _words(key, value)] + words


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


def _words(key: Any, value: Any) -> list[str]:
    """Give the words that vLLM makes of one line of its configuration file."""
    if value is False or value == []:
        return []
    if value is True:
        return [f"--{key}"]
    return [f"--{key}", *map(str, value if isinstance(value, list) else [value])]


def open_paths(routes: Sequence[str]) -> list[str]:
    """List the paths that `--open-routes` names, "metrics" for "/metrics".

    Raises:
        UsageError: a name is no path.
    """
    for route in routes:
        if not ROUTE.fullmatch(route.removeprefix("/")):
            raise UsageError(f"--open-routes {route!r} is no path: give one such as metrics.")
    return [f"/{route.removeprefix('/')}" for route in routes if route != EVERY_ROUTE]


def api_keys(
    file: Path | None, options: Sequence[str], environment: Mapping[str, str]
) -> list[str]:
    """Find the keys that open the server: of vLLM's options, else of the file or variable.

    Raises:
        InputError: the file cannot be read or is empty.
    """
    given, _ = split_keys(options)
    if given:
        return given
    if file is not None:
        return [read_key(file)]
    return [key for key in [environment.get(KEY_VARIABLE, "")] if key]


def split_keys(options: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part the keys among vLLM's options from all others.

    Raises:
        UsageError: vLLM could not read them.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--api-key", "--api_key", nargs="*", action="extend", default=[])
    try:
        found, others = parser.parse_known_args(list(options))
    except argparse.ArgumentError as error:
        raise UsageError(f"options for vLLM: {error}.") from error
    return [key for key in found.api_key if key], others


def guard_settings(
    host: str, keys: Sequence[str], routes: Sequence[str], max_body_mib: int
) -> dict[str, str]:
    """Make the environment of `Guard`; on this machine only vLLM's API asks for the key."""
    opened = open_paths(routes)
    if is_loopback(host) or EVERY_ROUTE in routes:
        opened.append(EVERY_ROUTE)
    return settings(keys, opened, max_body_mib << 20)
