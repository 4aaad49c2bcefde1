"""One GET of a server's /metrics: bounded in time and size, no redirects, no proxies.

Knows nothing of metrics. The server is not trusted: none of its words reach a message.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from gblm.errors import GblmError, InputError, MachineError, UsageError
from gblm.network import is_loopback

logger = logging.getLogger(__name__)

SECONDS = 10.0
# vLLM's metrics of one engine are some 100 KB.
MAX_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Target:
    """Where one server's metrics are.

    Attributes:
        name: of the server in messages: A or B.
        url: of the metrics, without credentials.
        key: sent as a bearer token; none if None.
    """

    name: str
    url: str
    key: str | None = field(default=None, repr=False)

    @classmethod
    def of(cls, name: str, url: str, key_file: Path | None = None) -> Target:
        """Check a server's address, and read its key.

        Args:
            name: A or B.
            url: of the server, or of its metrics.
            key_file: holds the API key.

        Raises:
            UsageError: this is not an http or https address, or it has more than host and path.
            InputError: the file holds no key.
        """
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            known = None
        if not known or not url.isprintable() or not url.isascii() or " " in url:
            raise UsageError(f"server {name}: give an address such as http://127.0.0.1:8000.")
        if "@" in parts.netloc or parts.query or parts.fragment:
            raise UsageError(
                f"server {name}: the address may hold host, port and path only; "
                "a key goes into --api-key-file."
            )
        key = None if key_file is None else _read_key(key_file)
        if key is not None and parts.scheme == "http" and not is_loopback(parts.hostname or ""):
            logger.warning("server %s: its API key is sent over http, unencrypted", name)
        path = parts.path.rstrip("/").removesuffix("/metrics")
        return cls(name, f"{parts.scheme}://{parts.netloc}{path}/metrics", key)

    def fetch(self, seconds: float = SECONDS) -> str:
        """The text of the metrics now.

        Args:
            seconds: for everything from connecting to the last byte.

        Raises:
            MachineError: there is no answer, not in time, or it is not 200.
            InputError: the answer is too large or not UTF-8.
        """
        limit = time.monotonic() + seconds
        try:
            status, body = self._get(limit)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if time.monotonic() >= limit or isinstance(error, TimeoutError):
                raise self._late(seconds) from error
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise MachineError(
                f"server {self.name} cannot be reached at {self.url}: {reason}."
            ) from error
        if time.monotonic() >= limit:
            raise self._late(seconds)
        if status != 200:
            raise self._refused(status)
        if len(body) > MAX_BYTES:
            raise InputError(
                f"server {self.name}: {self.url} gives more than {MAX_BYTES >> 20} MiB; "
                "that is not vLLM's metrics."
            )
        try:
            return body.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"server {self.name}: {self.url} is not UTF-8 text.") from error

    def _get(self, limit: float) -> tuple[int, bytes]:
        """Status and at most MAX_BYTES + 1 bytes; the connection is cut off at the limit."""
        parts = urlsplit(self.url)
        https = parts.scheme == "https"
        kind = http.client.HTTPSConnection if https else http.client.HTTPConnection
        connection = kind(parts.hostname or "", parts.port, timeout=limit - time.monotonic())
        headers = {"Accept": "text/plain; version=0.0.4"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        with contextlib.closing(connection):
            connection.connect()
            # A socket's own timeout starts anew with every byte of a slow server.
            timer = threading.Timer(limit - time.monotonic(), _cut_off, [connection.sock])
            timer.daemon = True
            timer.start()
            try:
                connection.request("GET", parts.path, headers=headers)
                response = connection.getresponse()
                body = response.read(MAX_BYTES + 1)
            finally:
                timer.cancel()
            if response.length and len(body) <= MAX_BYTES:
                raise http.client.IncompleteRead(b"")
            return response.status, body

    def _late(self, seconds: float) -> MachineError:
        return MachineError(f"server {self.name}: {self.url} did not answer within {seconds:g} s.")

    def _refused(self, status: int) -> GblmError:
        if 300 <= status < 400:
            hint = "redirects are not followed: give the final address"
        elif status in (401, 403):
            hint = "give the API key with --api-key-file"
        else:
            hint = "is this the address of a vLLM server?"
        return MachineError(f"server {self.name}: {self.url} answers HTTP {status}; {hint}.")


def _cut_off(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        # The plain socket's method: SSLSocket's own would let the reader go on unencrypted.
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


def _read_key(path: Path) -> str:
    try:
        key = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"API key file {path} cannot be read.") from error
    if not key or not key.isascii() or not key.isprintable():
        raise InputError(f"API key file {path} must hold one line of ASCII text, the key.")
    return key
