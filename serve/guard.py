"""Decide what vLLM's server lets in, before any of its own code: whose requests, and how large.

vLLM asks for the API key under some prefixes only and takes bodies of any size. `gblm serve` hands
this class to vLLM's option --middleware. vLLM makes it without arguments, so that its settings are
environment variables; see `settings`. Those of a process can be read by others of its user, and by
whoever sees its core dumps: they hold digests of the keys. Plain ASGI: knows nothing of vLLM.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

MIDDLEWARE = "gblm.serve.guard.Guard"
# A line for each key: what `digest` makes of it; without this variable every route is open.
KEYS_VARIABLE = "GBLM_SERVE_KEYS"
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
ROUTES_VARIABLE = "GBLM_SERVE_OPEN_ROUTES"
BODY_VARIABLE = "GBLM_SERVE_MAX_BODY_BYTES"
# What probes ask.
ALWAYS_OPEN = ("/health", "/ping")
MAX_DIGITS = 18


def settings(
    keys: Sequence[str], open_routes: Iterable[str], max_body_bytes: int
) -> dict[str, str]:
    """Make the environment of a `Guard`.

    Args:
        keys: any of them opens every route; none: nobody is asked for one.
        open_routes: paths that are open without a key, beside ALWAYS_OPEN.
        max_body_bytes: of a request.
    """
    found = {ROUTES_VARIABLE: "\n".join(open_routes), BODY_VARIABLE: str(max_body_bytes)}
    digests = "\n".join(digest(key.encode()) for key in keys)
    return found | ({KEYS_VARIABLE: digests} if keys else {})


def digest(key: bytes) -> str:
    """Write a key so that it can be checked but not read."""
    return f"sha256:{hashlib.sha256(key).hexdigest()}"


class Guard:
    """ASGI middleware: answers 401 without a key, 413 beyond the size, and hands on the rest."""

    def __init__(self, app: App, environment: Mapping[str, str] = os.environ) -> None:
        """Read the settings.

        Raises:
            ValueError: there is a variable for keys, but something else than digests in it, or no
                size.
        """
        self.app = app
        self.limit = int(environment[BODY_VARIABLE])
        self.open = {*ALWAYS_OPEN, *environment.get(ROUTES_VARIABLE, "").split("\n")} - {""}
        self.digests: list[str] | None = None
        if KEYS_VARIABLE in environment:
            self.digests = environment[KEYS_VARIABLE].split()
            if not self.digests or not all(map(DIGEST.fullmatch, self.digests)):
                raise ValueError(f"{KEYS_VARIABLE} must hold sha256: and the digest of each key.")

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Refuse a request, or hand it on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif not self._may_pass(scope):
            await _refuse_stranger(scope, receive, send)
        elif scope["type"] == "websocket":
            await self.app(scope, receive, send)
        else:
            await _Limited(self.app, self.limit, receive, send).run(scope)

    def _may_pass(self, scope: Mapping[str, Any]) -> bool:
        if self.digests is None or self._has_key(scope):
            return True
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        return scope["type"] == "http" and (path in self.open or _is_preflight(scope))

    def _has_key(self, scope: Mapping[str, Any]) -> bool:
        scheme, _, key = (_header(scope, b"authorization") or b"").partition(b" ")
        given, found = digest(key), False
        # All are compared, so that the time tells nothing.
        for known in self.digests or ():
            found |= hmac.compare_digest(given, known)
        return found and scheme.lower() == b"bearer"


class _Limited:
    """Handles one request whose body may have so many bytes, with a length or in chunks."""

    def __init__(self, app: App, limit: int, receive: Receive, send: Send) -> None:
        self.app, self.limit = app, limit
        self._receive, self._send = receive, send
        self.seen = 0
        self.started = self.refused = False

    async def run(self, scope: MutableMapping[str, Any]) -> None:
        length = _header(scope, b"content-length") or b"0"
        # Python refuses to read numbers of thousands of digits.
        if length.isdigit() and (len(length) > MAX_DIGITS or int(length) > self.limit):
            await self._refuse()
            return
        try:
            await self.app(scope, self.receive, self.send)
        except Exception:
            # The app was told that the client is gone; what it makes of it is no error.
            if not self.refused:
                raise

    async def receive(self) -> Message:
        """Give the app the body; its client is gone once that is too large."""
        if self.refused:
            return {"type": "http.disconnect"}
        message = await self._receive()
        self.seen += len(message.get("body", b""))
        if message["type"] != "http.request" or self.seen <= self.limit:
            return message
        await self._refuse()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Pass the app's answer on, unless one was given already."""
        if not self.refused:
            self.started = True
            await self._send(message)

    async def _refuse(self) -> None:
        self.refused = True
        if not self.started:
            why = f"The body has more than {self.limit} bytes, which is the limit of this server."
            await _answer(self._send, 413, why, [(b"connection", b"close")])


async def _refuse_stranger(scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close", "code": 1008})
        return
    why = "This server needs its API key on this route: `Authorization: Bearer KEY`."
    await _answer(send, 401, why, [(b"www-authenticate", b"Bearer")])


async def _answer(send: Send, status: int, why: str, more: list[tuple[bytes, bytes]]) -> None:
    """Answer with an error as OpenAI's clients expect it."""
    body = json.dumps({"error": {"message": why, "code": status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *more]})
    await send({"type": "http.response.body", "body": body})


def _header(scope: Mapping[str, Any], name: bytes) -> bytes | None:
    """Find the first header of this name."""
    found: Iterable[bytes] = (value for key, value in scope["headers"] if key.lower() == name)
    return next(iter(found), None)


def _is_preflight(scope: Mapping[str, Any]) -> bool:
    """Tell whether a browser asks before a request; vLLM's CORS middleware answers, no route."""
    asks = (b"origin", b"access-control-request-method")
    return scope["method"] == "OPTIONS" and all(_header(scope, name) is not None for name in asks)
