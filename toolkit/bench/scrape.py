"""One GET of a server's /metrics: bounded in time and size, no redirects, no proxies.

Knows nothing of metrics. The server is not trusted: none of its words reach a message.
"""

from __future__ import annotations

import http.client
import time
from dataclasses import dataclass, field
from pathlib import Path

from gblm.errors import GblmError, InputError, MachineError
from gblm.network import exchange, read_key, split_address, warn_of_plain_key

SECONDS = 10.0
# vLLM's metrics of one engine are some 100 KB.
MAX_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Target:
    """A target says where one server's metrics are.

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
        parts = split_address(f"server {name}", url)
        key = None if key_file is None else read_key(key_file)
        if key is not None:
            warn_of_plain_key(f"server {name}", parts)
        path = parts.path.rstrip("/").removesuffix("/metrics")
        return cls(name, f"{parts.scheme}://{parts.netloc}{path}/metrics", key)

    def fetch(self, seconds: float = SECONDS) -> str:
        """Fetch the text of the metrics.

        Args:
            seconds: for everything from connecting to the last byte.

        Raises:
            MachineError: there is no answer, not in time, or it is not 200.
            InputError: the answer is too large or not UTF-8.
        """
        limit = time.monotonic() + seconds
        try:
            status, body = exchange(self.url, self.key, limit, MAX_BYTES)
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
