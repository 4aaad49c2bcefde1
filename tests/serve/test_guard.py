"""Who may ask what, and how much: the guard in front of vLLM's routes, on apps that are none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from gblm.errors import InputError, UsageError
from gblm.serve.access import Server, api_key, open_paths
from gblm.serve.guard import KEYS_VARIABLE, MIDDLEWARE, Guard, settings
from gblm.serve.launch import command, environment

KEY = {"authorization": "Bearer secret"}
OPEN = ("/health", "/ping", "/metrics")
# What vLLM serves without its key, and what it does not.
OTHERS = (
    "/metrics/",
    "/tokenize",
    "/pause",
    "/invocations",
    "/v1/models",
    "/",
    "/health/x",
    "//ping",
)


class App:
    """Reads the whole body, then answers 200; as vLLM's, it makes a client's end an error."""

    def __init__(self, answers_first: bool = False) -> None:
        self.body: bytes | None = None
        self.answers_first = answers_first

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        start = {"type": "http.response.start", "status": 200, "headers": []}
        if self.answers_first:
            await send(start)
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                await send({"type": "http.response.start", "status": 400, "headers": []})
                raise RuntimeError("the client is gone")
            body, more = body + message["body"], message["more_body"]
        self.body = body
        if not self.answers_first:
            await send(start)
        await send({"type": "http.response.body", "body": b"done"})


def guard(
    app: App, *routes: str, keys: Iterable[str] = ("other", "secret"), limit: int = 9
) -> Guard:
    return Guard(app, settings(tuple(keys), routes, limit))


def ask(
    asked: Guard, path: str = "/v1/completions", headers: dict[str, str] | None = None,
    chunks: Iterable[bytes] = (b"",), **scope: str,
) -> tuple[int, dict[str, str], bytes]:  # fmt: skip
    """Status, headers and body of the answer."""
    sent: list[dict[str, Any]] = []
    parts = list(chunks)
    left = [
        {"type": "http.request", "body": part, "more_body": number < len(parts)}
        for number, part in enumerate(parts, 1)
    ]

    async def receive() -> dict[str, Any]:
        return left.pop(0)

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    lines = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
    asyncio.run(asked({"type": "http", "method": "POST", "path": path, "headers": lines} | scope,
                      receive, send))  # fmt: skip
    (start,) = (one for one in sent if one["type"] == "http.response.start")
    body = b"".join(one["body"] for one in sent if one["type"] == "http.response.body")
    return start["status"], {k.decode(): v.decode() for k, v in start["headers"]}, body


def test_every_route_but_the_probes_asks_for_the_key_and_says_how_to_send_it() -> None:
    app = App()
    for path in OTHERS:
        status, headers, body = ask(guard(app), path)
        assert (status, headers["www-authenticate"]) == (401, "Bearer"), path
        assert headers["content-length"] == str(len(body))
        assert "Authorization: Bearer KEY" in json.loads(body)["error"]["message"]
        assert app.body is None
    for path in OPEN[:2]:
        assert ask(guard(app), path)[0] == 200
    for path in (*OPEN, *OTHERS):
        assert ask(guard(app), path, KEY)[0] == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [("Bearer secret", 200), ("bearer other", 200), ("Bearer Secret", 401), ("Bearer secret ", 401),
     ("Bearer  secret", 401), ("Basic secret", 401), ("secret", 401), ("Bearer", 401), ("", 401)],
)  # fmt: skip
def test_a_key_is_all_of_it_after_the_word_bearer(header: str, status: int) -> None:
    assert ask(guard(App()), headers={"Authorization": header})[0] == status


def test_routes_that_were_opened_are_open_and_no_others() -> None:
    found = {path: ask(guard(App(), "/metrics"), path)[0] for path in (*OPEN, *OTHERS)}
    assert {path for path, status in found.items() if status == 200} == {*OPEN}
    assert ask(guard(App(), "/metrics"), "/api/metrics", root_path="/api")[0] == 200


def test_without_keys_nobody_is_asked_and_bodies_have_their_limit() -> None:
    assert ask(guard(App(), keys=()), "/pause")[0] == 200
    assert ask(guard(App(), keys=()), "/pause", chunks=[b"x" * 10])[0] == 413
    for left in ("", "secret", "sha256:secret", settings(["a"], (), 9)[KEYS_VARIABLE] + "\nsecret"):
        with pytest.raises(ValueError, match="must hold sha256: and the digest of each key"):
            Guard(App(), settings((), (), 9) | {KEYS_VARIABLE: left})


def test_a_preflight_passes_and_a_bare_options_does_not() -> None:
    whole = {"origin": "https://x", "access-control-request-method": "POST"}
    assert ask(guard(App()), "/metrics", whole, method="OPTIONS")[0] == 200
    for name in whole:
        assert ask(guard(App()), "/metrics", {name: whole[name]}, method="OPTIONS")[0] == 401
    assert ask(guard(App()), "/metrics", whole, method="GET")[0] == 401


def test_websockets_need_the_key_and_the_lifespan_does_not() -> None:
    sent, passed = [], []

    async def app(scope: dict[str, Any], *_: object) -> None:
        passed.append(scope["type"])

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    for kind, headers in (("websocket", []), ("lifespan", []),
                          ("websocket", [(b"authorization", b"Bearer secret")])):  # fmt: skip
        scope = {"type": kind, "path": "/health", "headers": headers}
        asyncio.run(guard(app)(scope, receive, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]
    assert passed == ["lifespan", "websocket"]


@pytest.mark.parametrize("chunks", [[b"x" * 9], [b"xxxx", b"xxxxx"], [b"", b"x" * 9, b""], [b""]])
def test_bodies_within_the_limit_arrive_whole(chunks: list[bytes]) -> None:
    app, whole = App(), b"".join(chunks)
    headers = KEY | ({"content-length": str(len(whole))} if len(chunks) == 1 else {})
    assert ask(guard(app), headers=headers, chunks=chunks) == (200, {}, b"done")
    assert app.body == whole


@pytest.mark.parametrize(
    ("chunks", "headers"),
    [([], {"content-length": "10"}), ([], {"content-length": "9" * 5000}),
     ([b"x" * 10], {}), ([b"xxxxx"] * 2, {}), ([b"x"] * 50, {}),
     ([b"x" * 50], {"content-length": "5"})],
)  # fmt: skip
def test_larger_ones_are_refused_in_one_sentence(
    chunks: list[bytes], headers: dict[str, str]
) -> None:
    app = App()
    status, sent, body = ask(guard(app), headers=KEY | headers, chunks=chunks)
    assert (status, sent["connection"]) == (413, "close")
    assert "more than 9 bytes" in json.loads(body)["error"]["message"]
    assert app.body is None


def test_an_answer_that_has_begun_is_cut_off() -> None:
    status, _, body = ask(guard(App(answers_first=True)), headers=KEY, chunks=[b"x" * 10])
    assert (status, body) == (200, b"")


def test_errors_of_the_app_stay_errors() -> None:
    async def app(*_: object) -> None:
        raise RuntimeError("of the app")

    with pytest.raises(RuntimeError, match="of the app"):
        ask(guard(app), headers=KEY)


def test_serve_hands_the_guard_to_vllm_with_its_settings(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    server = Server(tmp_path, host="0.0.0.0", api_key_file=tmp_path / "key", max_body_size=3)
    words = command(server)
    assert words[-2:] == ["--middleware", MIDDLEWARE]  # of several the last one comes first
    made = Guard(App(), environment(server, {}))
    assert (made.limit, made.open) == (3 << 20, {"/health", "/ping"})
    assert ask(made, "/metrics")[0] == 401
    assert ask(made, "/metrics", KEY)[0] == 200
    opened = Server(tmp_path, api_key_file=tmp_path / "key", open_routes=("metrics", "/pause"))
    made = Guard(App(), environment(opened, {}))
    assert [ask(made, path)[0] for path in ("/metrics", "/pause", "/v1/models")] == [200, 200, 401]


def test_the_environment_holds_digests_and_no_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret")
    left = {KEYS_VARIABLE: "old", "VLLM_API_KEY": "secret"}
    for server in (Server(tmp_path), Server(tmp_path, api_key_file=tmp_path / "key")):
        found = environment(server, left)
        assert not any("secret" in value for value in found.values())
        made = Guard(App(), found)
        assert (ask(made, headers=KEY)[0], ask(made)[0]) == (200, 401)
    assert KEYS_VARIABLE not in environment(Server(tmp_path), {KEYS_VARIABLE: "old"})


def test_where_keys_come_from(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("of the file")
    variable = {"VLLM_API_KEY": "of the variable"}
    assert api_key(None, {}) is api_key(None, {"VLLM_API_KEY": ""}) is None
    assert api_key(None, variable) == "of the variable"
    assert api_key(tmp_path / "key", variable) == "of the file"
    with pytest.raises(InputError, match="cannot be read"):
        api_key(tmp_path / "none", {})


@pytest.mark.parametrize("route", ["", "/", "a b", "..?", "/v1//x", "a\nb", "*"])
def test_what_is_no_path_is_refused(route: str) -> None:
    with pytest.raises(UsageError, match="is no path"):
        open_paths([route])
