"""Who can reach the server: its address and API key, checked before vLLM starts."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from gblm.errors import InputError, UsageError
from gblm.network import KEY_VARIABLE, is_loopback, read_key
from gblm.serve.guard import ALWAYS_OPEN, settings

logger = logging.getLogger(__name__)

PROXY = "deploy/nginx.conf"
# In `--open-routes`: no route asks for a key, but those of vLLM under /v1.
EVERY_ROUTE = "all"
ROUTE = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")
# Options of vLLM that listen on ports of their own, and where; None: on --host. None knows a key.
DOORS = {"--grpc": None, "--grpc-port": None, "--kv-events-config": "*"}
RUST_VARIABLE = "VLLM_USE_RUST_FRONTEND"


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
    """Refuse what makes vLLM answer past the API key and `Guard`.

    Args:
        host: address to bind.
        has_key: whether there is an API key.
        insecure: whether the user allows other machines without one.
        words: vLLM's options, see `with_config`.
        environment: of vLLM.

    Raises:
        UsageError: there is a key, or other machines would get in though `insecure` is not set.
    """
    for door, address in DOORS.items():
        is_allowed = not has_key and (insecure or is_loopback(address or host))
        if not is_allowed and any(_is_short_for(door, word) for word in words):
            raise UsageError(
                f"vLLM's {door} listens on a port that asks for no API key: leave it out, of a "
                "--config file, too, or serve without a key: this machine alone, or others with "
                "--insecure."
            )
    if has_key and environment.get(RUST_VARIABLE, "").strip() not in ("", "0"):
        raise UsageError(
            f"{RUST_VARIABLE}={environment[RUST_VARIABLE]} puts another server in the place of the "
            "one that gblm guards with the API key: unset it, or serve without a key."
        )


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
    """Find the keys that vLLM will accept: of its own options, else of the file or variable.

    Raises:
        InputError: the file cannot be read or is empty.
    """
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    parser.add_argument("--api-key", "--api_key", nargs="*", action="extend", default=[])
    try:
        given = [key for key in parser.parse_known_args(list(options))[0].api_key if key]
    except argparse.ArgumentError as error:
        raise UsageError(f"options for vLLM: {error}.") from error
    if given:
        return given
    if file is not None:
        return [read_key(file)]
    return [key for key in [environment.get(KEY_VARIABLE, "")] if key]


def guard_settings(
    host: str, keys: Sequence[str], routes: Sequence[str], max_body_mib: int
) -> dict[str, str]:
    """Make the environment of `Guard`; keys are asked for beyond this machine only."""
    asks = not is_loopback(host) and EVERY_ROUTE not in routes
    return settings(keys if asks else (), open_paths(routes), max_body_mib << 20)
