"""Who can reach the server: its address, API key and certificate, checked before vLLM starts."""

from __future__ import annotations

import argparse
import logging
import re
import ssl
from collections.abc import Mapping, Sequence
from pathlib import Path

from gblm.errors import InputError, UsageError
from gblm.network import is_loopback
from gblm.serve.guard import ALWAYS_OPEN, settings

logger = logging.getLogger(__name__)

KEY_VARIABLE = "VLLM_API_KEY"
PROXY = "deploy/nginx.conf"
# In `--open-routes`: no route asks for a key, but those of vLLM under /v1.
EVERY_ROUTE = "all"
ROUTE = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*")


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
        name = word.partition("=")[0]
        if len(name) > 3 and "--host".startswith(name):  # vLLM takes abbreviations
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


def open_paths(routes: Sequence[str]) -> list[str]:
    """The paths that `--open-routes` names, "metrics" for "/metrics".

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
    """The keys that vLLM will accept: those among its own options, else the file's or variable's.

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
    """The environment of `gblm.serve.guard.Guard`; keys are asked for beyond this machine only."""
    asks = not is_loopback(host) and EVERY_ROUTE not in routes
    return settings(keys if asks else (), open_paths(routes), max_body_mib << 20)


def check_certificate(certificate: Path | None, key: Path | None) -> None:
    """Load a certificate and its key as the server will.

    Raises:
        UsageError: one is given without the other.
        InputError: one cannot be read, is no PEM file, or they do not belong together.
    """
    if certificate is None and key is None:
        return
    if certificate is None or key is None:
        raise UsageError("--ssl-certfile and --ssl-keyfile go together: give both.")
    for path in (certificate, key):
        try:
            path.read_bytes()
        except OSError as error:
            raise InputError(f"TLS file {path} cannot be read: {error.strerror}.") from error
    try:
        # Without the callback OpenSSL would ask the terminal for the password of a locked key.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            certificate, key, password=lambda: ""
        )
    except (ssl.SSLError, ValueError) as error:
        raise InputError(
            f"{certificate} and {key} are no certificate and its key in PEM format without a "
            f"password: {error}."
        ) from error


def read_key(path: Path) -> str:
    """The API key in a file.

    Raises:
        InputError: the file cannot be read or is empty.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"API key file {path} cannot be read: {error}") from error
    if not key:
        raise InputError(f"API key file {path} is empty.")
    return key
