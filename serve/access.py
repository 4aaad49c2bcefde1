"""Who can reach the server: its address, API key and certificate, checked before vLLM starts."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Sequence
from pathlib import Path

from gblm.errors import InputError, UsageError
from gblm.network import is_loopback

logger = logging.getLogger(__name__)

KEY_VARIABLE = "VLLM_API_KEY"
PROXY = "deploy/nginx.conf"


def check_address(host: str, has_key: bool, insecure: bool, options: Sequence[str] = ()) -> None:
    """Refuse a server that strangers could use; say what a key leaves open.

    Raises:
        UsageError: the address is not this machine's own and there is no key, or it is given where
            it would not be checked.
    """
    for word in options:
        name = word.partition("=")[0]
        if len(name) > 3 and "--host".startswith(name):  # vLLM takes abbreviations
            raise UsageError(f"{word}: give --host before the `--`, where it is checked.")
    if is_loopback(host):
        return
    if has_key:
        logger.warning(
            "the API key covers vLLM's routes under /v1 only: put a proxy with an allow list, such "
            "as %s, between this server and a network you do not trust",
            PROXY,
        )
    elif insecure:
        logger.warning("anybody who reaches %s can use this server: it has no API key", host)
    else:
        raise UsageError(
            f"--host {host} opens the server to other machines without an API key: give "
            f"--api-key-file or set {KEY_VARIABLE}, or pass --insecure if the network is yours."
        )


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
