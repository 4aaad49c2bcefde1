"""Misbehaving clients and killed processes, which no load generator offers, against a live server.

Small on purpose: load itself comes from `vllm bench serve`. Used by soak.py and, on a tiny model,
by the tests of servers in tests/serve.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

# Longer than anything takes on a machine that is shared.
SECONDS = 600.0
# Shorter than a block of vLLM's cache, so that the second asking computes what the first did.
PROMPT = "Once upon"


@dataclass
class Answer:
    """How one request ended; complete: with all the tokens that it asked for."""

    status: int | None = None
    tokens: int = 0
    complete: bool = False


@dataclass
class Started:
    """Requests that the server is working on, and how many streams have had their first token."""

    answers: list[Answer] = field(default_factory=list)
    begun: int = 0


def ask(model: str, **fields: Any) -> dict[str, Any]:
    """The body of a greedy completion of 12 tokens, with some fields changed."""
    body = {"model": model, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    return body | {"ignore_eos": True} | fields


def greedy(url: str, model: str) -> list[int]:
    """The tokens of a healthy request.

    Raises:
        httpx.HTTPError: it did not succeed.
    """
    body = ask(model, return_token_ids=True)
    done = httpx.post(f"{url}/v1/completions", json=body, timeout=SECONDS).raise_for_status()
    tokens: list[int] = done.json()["choices"][0]["token_ids"]
    return tokens


def abort_storm(url: str, model: str, clients: int, tokens: int) -> dict[str, Any]:
    """Half of the clients hang up after their first token; the others must get everything."""

    async def run() -> tuple[Started, Started]:
        staying, leaving = Started(), Started()
        async with client_of() as client:
            await asyncio.gather(*(
                _stream(client, url, ask(model, max_tokens=tokens), side, hang_up)
                for number in range(clients)
                for side, hang_up in [(leaving, True) if number % 2 else (staying, False)]
            ))  # fmt: skip
        return staying, leaving

    staying, leaving = asyncio.run(run())
    return {
        "clients": clients,
        "hung_up": leaving.begun,
        "stayed": len(staying.answers),
        "stayed_complete": sum(answer.complete for answer in staying.answers),
        "running_after": settle(url),
    }


def sigterm_under_load(
    url: str, process: psutil.Popen, model: str, clients: int, tokens: int
) -> dict[str, Any]:
    """SIGTERM while as many streams as plain requests are answered; what became of them all."""

    async def run() -> tuple[Started, float]:
        started, body = Started(), ask(model, max_tokens=tokens)
        async with client_of() as client:
            tasks = [
                asyncio.create_task(
                    _stream(client, url, body, started)
                    if number % 2
                    else _plain(client, url, body, started)
                )
                for number in range(clients)
            ]
            while started.begun < clients // 2 or await _running(client, url) < clients:
                await asyncio.sleep(0.02)
                if any(task.done() for task in tasks):
                    break
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            await asyncio.gather(*tasks)
        return started, began

    started, began = asyncio.run(run())
    answered = time.monotonic() - began
    code = process.wait(SECONDS)
    return {
        "in_flight": len(started.answers),
        "complete": sum(answer.complete for answer in started.answers),
        "seconds_to_last_answer": round(answered, 2),
        "seconds_to_exit": round(time.monotonic() - began, 2),
        "exit_code": code,
    }


def seconds_for(url: str, model: str, clients: int, tokens: int) -> float:
    """How long so many streams of so many tokens take."""

    async def run() -> None:
        async with client_of() as client:
            body, started = ask(model, max_tokens=tokens), Started()
            await asyncio.gather(*(_stream(client, url, body, started) for _ in range(clients)))

    began = time.monotonic()
    asyncio.run(run())
    return time.monotonic() - began


def kill_engine(
    url: str, process: psutil.Popen, model: str, clients: int, **fields: Any
) -> dict[str, Any]:
    """SIGKILL vLLM's engine under load; how soon /health is red, and how `gblm serve` ends.

    The fields are those of `client_of`.
    """

    async def run() -> tuple[Started, float, int | None]:
        started, body = Started(), ask(model, max_tokens=200)
        async with client_of(**fields) as client:
            tasks = [
                asyncio.create_task(_stream(client, url, body, started)) for _ in range(clients)
            ]
            while started.begun < clients:
                await asyncio.sleep(0.02)
            engine_of(process.pid).kill()
            began = time.monotonic()
            status: int | None = 200
            while status == 200 and time.monotonic() - began < SECONDS:
                try:
                    status = (await client.get(f"{url}/health", timeout=2)).status_code
                except httpx.HTTPError:
                    status = None
                await asyncio.sleep(0.05)
            red = time.monotonic() - began
            await asyncio.gather(*tasks)
        return started, red, status

    children = psutil.Process(process.pid).children(recursive=True)
    started, red, status = asyncio.run(run())
    code = process.wait(SECONDS)
    _, alive = psutil.wait_procs(children, timeout=SECONDS)
    return {
        "in_flight": clients,
        "incomplete": sum(not answer.complete for answer in started.answers),
        "seconds_to_red_health": round(red, 2),
        "health": status or "closed",
        "exit_code": code,
        "processes_left": len(alive),
    }


def engine_of(pid: int) -> psutil.Process:
    """vLLM's engine below a server's process."""
    children = psutil.Process(pid).children(recursive=True)
    (engine,) = (child for child in children if "EngineCore" in " ".join(child.cmdline()))
    return engine


def settle(url: str) -> int:
    """Requests still running a while after the last client left."""
    running, limit = 1, time.monotonic() + 30
    while running and time.monotonic() < limit:
        running = in_flight(httpx.get(f"{url}/metrics", timeout=SECONDS).text)
        time.sleep(0.1)
    return running


def client_of(**fields: Any) -> httpx.AsyncClient:
    """A client that opens a connection for each request, as many at once as it likes."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    return httpx.AsyncClient(timeout=SECONDS, limits=limits, **fields)


async def _stream(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], started: Started,
    hang_up: bool = False,
) -> None:  # fmt: skip
    answer, ended = Answer(), False
    started.answers.append(answer)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    try:
        async with client.stream("POST", f"{url}/v1/completions", json=body | options) as lines:
            answer.status = lines.status_code
            async for line in lines.aiter_lines():
                if not line.startswith("data: {"):
                    ended = ended or line == "data: [DONE]"
                    continue
                event = json.loads(line[6:])
                if event.get("choices") and answer.tokens == 0:
                    started.begun += 1
                    answer.tokens = 1
                    if hang_up:
                        return
                if event.get("usage"):
                    answer.tokens = event["usage"]["completion_tokens"]
    except httpx.HTTPError:
        return
    answer.complete = ended and answer.status == 200 and answer.tokens == body["max_tokens"]


async def _plain(
    client: httpx.AsyncClient, url: str, body: dict[str, Any], started: Started
) -> None:
    answer = Answer()
    started.answers.append(answer)
    try:
        done = await client.post(f"{url}/v1/completions", json=body)
    except httpx.HTTPError:
        return
    answer.status = done.status_code
    if done.status_code == 200:
        answer.tokens = done.json()["usage"]["completion_tokens"]
        answer.complete = answer.tokens == body["max_tokens"]


async def _running(client: httpx.AsyncClient, url: str) -> int:
    return in_flight((await client.get(f"{url}/metrics")).text)


def in_flight(metrics: str) -> int:
    """Requests that vLLM's metrics call running or waiting."""
    names = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    found = [line for line in metrics.splitlines() if line.startswith(names)]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in found))
