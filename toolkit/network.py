"""Addresses, and a GET over HTTP: bounded in time and size, no redirects, no proxies.

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
from urllib.parse import urlsplit

from gblm.errors import InputError, MachineError, UsageError

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
    """Tell whether only this machine can reach an address; of unknown names others can."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def server_address(what: str, url: str, key: str | None, ending: str) -> str:
    """Check the address of a server, and say when its key would be read on the way.

    Args:
        what: the server is called in messages.
        url: scheme, host, port and path.
        key: that will be sent to it, if any.
        ending: of the path, which is left out.

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
    if key is not None and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        logger.warning("%s: its API key is sent over http, unencrypted", what)
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix(ending)}"


def get(what: str, url: str, key: str | None, seconds: float, max_bytes: int) -> bytes:
    """Ask a server once.

    Args:
        what: the server is called in messages.
        url: made from a `server_address`.
        key: sent as a bearer token; none if None.
        seconds: for everything from connecting to the last byte.
        max_bytes: of the answer.

    Raises:
        MachineError: there is no whole answer, not in time, or it is not 200.
        InputError: the answer is too large.
    """
    limit = time.monotonic() + seconds
    try:
        status, answer = _exchange(url, key, limit, max_bytes)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = getattr(error, "strerror", None) or type(error).__name__
        if time.monotonic() < limit and not isinstance(error, TimeoutError):
            raise MachineError(f"{what} cannot be reached at {url}: {reason}.") from error
        status = None
    if status is None or time.monotonic() >= limit:
        raise MachineError(f"{what}: {url} did not answer within {seconds:g} s.")
    if status != 200:
        hint = "is this the address of a vLLM server?"
        if 300 <= status < 400:
            hint = "redirects are not followed: give the final address."
        elif status in (401, 403):
            hint = "give the API key with --api-key-file."
        raise MachineError(f"{what}: {url} answers HTTP {status}; {hint}")
    if len(answer) > max_bytes:
        raise InputError(
            f"{what}: {url} gives more than {max_bytes >> 20} MiB; no vLLM server answers so."
        )
    return answer


def _exchange(url: str, key: str | None, limit: float, max_bytes: int) -> tuple[int, bytes]:
    """Give status and answer; of an answer that is too long one byte more than is allowed."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=limit - time.monotonic())
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    with contextlib.closing(connection):
        connection.connect()
        # A socket's own timeout starts anew with every byte of a slow server.
        timer = threading.Timer(limit - time.monotonic(), _cut_off, [connection.sock])
        timer.daemon = True
        timer.start()
        try:
            connection.request("GET", parts.path, headers=headers)
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
