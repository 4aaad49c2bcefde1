"""Requests that a server must refuse, one after another or in a storm."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass

import httpx
from faults import SECONDS, ask, client_of

# Answers that a client is to blame for.
REFUSED = range(400, 500)


@dataclass(frozen=True)
class Bad:
    """A request that must be refused; its name says what is wrong with it."""

    name: str
    body: bytes
    path: str = "/v1/completions"


def bad_requests(model: str, context: int) -> list[Bad]:
    """Everything a broken or hostile client may send to a server that takes `context` tokens."""
    good = json.dumps(ask(model)).encode()
    changed = {
        "huge n": {"n": 10**6},
        "n of 65": {"n": 65},
        "n of −1": {"n": -1},
        "absurd max_tokens": {"max_tokens": 10**15},
        "negative max_tokens": {"max_tokens": -1},
        "another model": {"model": "../../etc/passwd"},
        "prompt of a wrong type": {"prompt": {"text": 1}},
        "max_tokens of a wrong type": {"max_tokens": "many"},
        "stream of a wrong type": {"stream": [1, 2]},
        "temperature of −1": {"temperature": -1},
        "top_p of 7": {"top_p": 7},
        "logprobs of a million": {"logprobs": 10**6},
        "prompt beyond the context": {"prompt": "word " * (2 * context)},
        "empty prompt": {"prompt": []},
        "token ids beyond the vocabulary": {"prompt": [10**9, 1, 2]},
        "negative token ids": {"prompt": [-5, 1, 2]},
        "broken grammar": {"structured_outputs": {"regex": "(["}},
        "logit_bias beyond the vocabulary": {"logit_bias": {"99999999": 1.0}},
    }
    raw = {
        "malformed JSON": good[:-5],
        "no body": b"",
        "a list for an object": b"[1, 2, 3]",
        "deep JSON": b'{"a":' * 100_000,
        "invalid UTF-8": good.replace(b"Once", b"\xff\xfe\xc3("),
        "NUL bytes": b"\0" * 1000,
        "a number of 5000 digits": good.replace(
            b'"max_tokens": 12', b'"max_tokens": ' + b"9" * 5000
        ),
    }
    asked = [
        Bad(name, json.dumps(ask(model) | fields).encode()) for name, fields in changed.items()
    ]
    chat = json.dumps({"model": model, "messages": [{"role": "user", "content": {"x": 1}}]})
    return [
        *asked,
        *(Bad(name, body) for name, body in raw.items()),
        Bad("chat message of a wrong type", chat.encode(), "/v1/chat/completions"),
        Bad("chat without messages", good, "/v1/chat/completions"),
    ]


def refuse_all(url: str, bad: list[Bad]) -> dict[str, int | None]:
    """Send bad requests one after another; the status of each by its name."""
    with httpx.Client(timeout=SECONDS, headers={"Content-Type": "application/json"}) as client:
        return {one.name: client.post(url + one.path, content=one.body).status_code for one in bad}


def bad_storm(url: str, bad: list[Bad], at_once: int, rounds: int) -> list[int | None]:
    """Send all of them again and again, so many at once; the status of each."""

    async def send(client: httpx.AsyncClient, one: Bad, gate: asyncio.Semaphore) -> int | None:
        async with gate:
            try:
                return (await client.post(url + one.path, content=one.body)).status_code
            except httpx.HTTPError:
                return None

    async def run() -> list[int | None]:
        gate = asyncio.Semaphore(at_once)
        async with client_of(headers={"Content-Type": "application/json"}) as client:
            return await asyncio.gather(*(send(client, one, gate) for one in bad * rounds))

    return asyncio.run(run())
