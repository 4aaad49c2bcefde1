"""Addresses, and one exchange over HTTP: bounded in time and size, no redirects, no proxies.

A server is not trusted: none of its words reach a message here.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import logging
import socket
import threading
import time
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from gblm.errors import InputError, UsageError

logger = logging.getLogger(__name__)

# Holds the API key of a server where no file does; the name is vLLM's.
KEY_VARIABLE = "VLLM_API_KEY"


def read_key(path: Path) -> str:
    """Read the API key in a file.

    Raises:
        InputError: the file cannot be read, or does not hold one line that fits a header.
    """
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"API key file {path} cannot be read: {error}.") from error
    if not key or not key.isascii() or not key.isprintable():
        raise InputError(f"API key file {path} must hold one line of ASCII text, the key.")
    return key


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; unknown names count as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def split_address(what: str, url: str) -> SplitResult:
    """Check the address of a server.

    Args:
        what: the server is called in messages.
        url: scheme, host, port and path.

    Raises:
        UsageError: this is not an http or https address, or it has more than host and path.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = None
    if not known or not url.isprintable() or not url.isascii() or " " in url:
        raise UsageError(f"{what}: give an address such as http://127.0.0.1:8000.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"{what}: the address may hold host, port and path only; "
            "a key goes into --api-key-file."
        )
    return parts


def warn_of_plain_key(what: str, parts: SplitResult) -> None:
    """Say when a key would be read by everybody on the way to a server."""
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        logger.warning("%s: its API key is sent over http, unencrypted", what)


def exchange(
    url: str, key: str | None, limit: float, max_bytes: int, body: bytes | None = None
) -> tuple[int, bytes]:
    """One GET, or one POST of JSON.

    Args:
        url: checked with `split_address`.
        key: sent as a bearer token; none if None.
        limit: of `time.monotonic()`, when the connection is cut off.
        max_bytes: of the answer; one more is read, so that the caller sees a longer one.
        body: JSON to POST; None is a GET.

    Returns:
        Status and answer.

    Raises:
        OSError, http.client.HTTPException, ValueError: there is no whole answer.
    """
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=limit - time.monotonic())
    headers = {"Accept": "text/plain; version=0.0.4" if body is None else "application/json"}
    if body is not None:
        headers["Content-Type"] = "application/json"
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    with contextlib.closing(connection):
        connection.connect()
        # A socket's own timeout starts anew with every byte of a slow server.
        timer = threading.Timer(limit - time.monotonic(), _cut_off, [connection.sock])
        timer.daemon = True
        timer.start()
        try:
            connection.request("GET" if body is None else "POST", parts.path, body, headers)
            response = connection.getresponse()
            answer = response.read(max_bytes + 1)
        finally:
            timer.cancel()
        if response.length and len(answer) <= max_bytes:
            raise http.client.IncompleteRead(b"")
        return response.status, answer


def _cut_off(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # The plain socket's method: SSLSocket's own would let the reader go on unencrypted.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)
