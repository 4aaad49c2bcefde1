"""`gblm bench watch` against servers whose expositions prometheus_client itself writes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Outcome

pytest.importorskip("prometheus_client")
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from gblm.bench import metrics
from gblm.bench import watch as watching
from gblm.bench.metrics import (
    E2E,
    ITL,
    OUTPUT,
    PROMPT,
    TPOT,
    TTFT,
    Snapshot,
    Target,
)
from gblm.bench.watch import LOAD, watch
from gblm.errors import InputError, MachineError, UsageError
from gblm.record import Record

BUCKETS = {
    TTFT: (0.01, 0.04, 0.1, 0.25, 0.5, 1),
    TPOT: (0.01, 0.025, 0.05, 0.1),
    ITL: (0.01, 0.025, 0.05, 0.1),
    E2E: (0.3, 0.5, 1, 2, 5),
    PROMPT: (10, 100, 1000),
    OUTPUT: (10, 100, 1000),
}


class Clock:
    """Time that passes in sleep alone, so that a busy machine changes nothing."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watching, "time", clock)
    return clock


class Engine:
    """The metrics of one vLLM, with its labels; `slow` stretches its latencies."""

    def __init__(self, slow: float = 1.0, seed: int = 0, started: float = 1.0) -> None:
        self.slow, self.random = slow, np.random.default_rng(seed)
        self.registry = CollectorRegistry()
        labels, rest = ("model_name", "engine"), {"registry": self.registry}
        self.histograms = {
            name: Histogram(name, "-", labels, buckets=bounds, **rest).labels("m", "0")
            for name, bounds in BUCKETS.items()
        }
        self.tokens = Counter("vllm:generation_tokens", "-", labels, **rest).labels("m", "0")
        self.ended = Counter("vllm:request_success", "-", (*labels, "finished_reason"), **rest)
        for reason in ("stop", "length", "abort", "error"):
            self.ended.labels("m", "0", reason)
        self.http = Counter("http_requests", "-", ("handler", "method", "status"), **rest)
        Gauge("process_start_time_seconds", "-", **rest).set(started)

    def serve(self, requests: int, prompt: int = 50, tokens: int = 20, failed: int = 0) -> None:
        """Requests that are answered; the last ones fail."""
        for number in range(requests):
            first, token = self.slow * self.random.uniform([0.05, 0.01], [0.2, 0.04])
            self.histograms[TTFT].observe(first)
            self.histograms[TPOT].observe(token)
            for _ in range(tokens - 1):
                self.histograms[ITL].observe(token)
            self.histograms[E2E].observe(first + token * (tokens - 1))
            self.histograms[PROMPT].observe(prompt)
            self.histograms[OUTPUT].observe(tokens)
            self.tokens.inc(tokens)
            bad = number >= requests - failed
            self.ended.labels("m", "0", "error" if bad else "stop").inc()
            self.http.labels("none", "POST", "5xx" if bad else "2xx").inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)


class Site:
    """What a URL answers: `script` is called before each reading with its number."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.script: Callable[[int], object] = lambda number: self.engine.serve(8)
        self.reads: list[dict[str, str]] = []
        self.status, self.headers = 200, {}
        self.body: bytes | None = None
        self.url = ""

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.reads.append(dict(request.headers) | {"path": request.path})
        self.script(len(self.reads) - 1)
        body = self.engine.text() if self.body is None else self.body
        request.send_response(self.status)
        for name, value in ({"Content-Length": str(len(body))} | self.headers).items():
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)


@pytest.fixture
def make_site() -> Iterator[Callable[..., Site]]:
    servers = []

    def make(slow: float = 1.0, seed: int = 0) -> Site:
        site = Site(Engine(slow, seed))

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.answer(self)

            def log_message(self, *args: object) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.handle_error = lambda *args: None  # a client that hangs up is part of the tests
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        servers.append(server)
        site.url = f"http://127.0.0.1:{server.server_port}"
        return site

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def run(a: Site, b: Site) -> Record:
    """Ten rounds of ten seconds."""
    return watch(Target.of("A", a.url), Target.of("B", b.url), 100, 10)


def said(record: Record, metric: str) -> str:
    """The verdict on a metric."""
    (found,) = [note for note in record.verdict.notes if note.startswith(f"{metric}: ")]
    return found.removeprefix(f"{metric}: ")


def beyond_verdicts(record: Record) -> list[str]:
    """Caveats and problems, which follow the five verdicts."""
    return list(record.verdict.notes[5:])


def test_a_faster_server_is_found_better(make_site: Callable[..., Site]) -> None:
    record = run(make_site(slow=1.0, seed=1), make_site(slow=0.5, seed=2))
    for metric in ("ttft_ms_mean", "tpot_ms_mean", "itl_ms_mean", "e2e_ms_mean"):
        ratio = record.ratio("B", LOAD, metric)
        assert ratio is not None
        assert len(ratio.rounds) == 10
        assert ratio.low < 0.5 < ratio.high, metric
        assert said(record, metric).startswith(f"B is better; B has {ratio.median:.2f} times A's")
    assert record.sides["A"]["finished"] == 80
    assert record.value("A", LOAD, "prompt_tokens") == 50
    assert record.value("A", LOAD, "failed_percent") == 0
    assert beyond_verdicts(record) == []


def test_a_slower_server_is_found_worse(make_site: Callable[..., Site]) -> None:
    record = run(make_site(slow=0.5), make_site(slow=1.0))
    assert said(record, "ttft_ms_mean") == "B is worse; B has 2.00 times A's (2.00–2.00)"


def test_more_tokens_a_second_are_better(make_site: Callable[..., Site]) -> None:
    a, b = make_site(), make_site()
    b.script = lambda number: b.engine.serve(16)
    assert said(run(a, b), "output_tok_s").startswith("B is better; B has 2.00 times")


def test_means_and_counts_are_those_of_the_window_alone(make_site: Callable[..., Site]) -> None:
    a, b = make_site(), make_site()
    a.engine.serve(1000, prompt=9)  # before the window
    record = run(a, b)
    assert record.sides["A"]["begun"] == 80
    assert record.value("A", LOAD, "ttft_ms_mean") == pytest.approx(125, rel=0.15)
    assert record.value("A", LOAD, "prompt_tokens") == 50


def test_equal_servers_show_no_difference(make_site: Callable[..., Site]) -> None:
    record = run(make_site(seed=3), make_site(seed=4))
    verdicts = [note.partition(": ")[2] for note in record.verdict.notes]
    assert [text[:36] for text in verdicts] == ["no difference that this window shows"] * 5


def test_too_few_requests_are_no_valid_record(make_site: Callable[..., Site]) -> None:
    a, b = make_site(), make_site()
    b.script = lambda number: number <= 2 and b.engine.serve(10)
    record = run(a, b)
    assert not record.verdict.valid
    assert record.verdict.reasons == ("server B: 20 requests ended, at least 30 are needed",)
    assert record.rows == ()


def test_requests_in_few_rounds_get_no_verdict(make_site: Callable[..., Site]) -> None:
    a, b = make_site(), make_site()
    b.script = lambda number: b.engine.serve(40 if number == 2 else 0)
    record = run(a, b)
    assert said(record, "e2e_ms_mean").startswith("no verdict, as there are too few rounds")
    assert record.verdict.valid


@pytest.mark.parametrize("started", [1.0, 2.0])
def test_a_restart_makes_its_round_invalid(make_site: Callable[..., Site], started: float) -> None:
    a, b = make_site(), make_site()

    def restart(number: int) -> None:
        if number == 4:
            # With a new start time even counters that have overtaken the old ones are noticed.
            b.engine = Engine(started=started)
            b.engine.serve(5 if started == 1.0 else 500)
        b.engine.serve(8)

    b.script = restart
    record = run(a, b)
    assert len(record.row("A", LOAD, "output_tok_s").rounds) == 9
    assert record.sides["A"]["begun"] == 72 == record.sides["B"]["begun"]
    (problem,) = beyond_verdicts(record)
    assert "server B restarted" in problem


def test_a_failed_reading_lengthens_the_round(make_site: Callable[..., Site]) -> None:
    a, b = make_site(), make_site()

    def fail(number: int) -> None:
        a.status = 500 if number == 3 else 200
        a.engine.serve(8)

    a.script = fail
    record = run(a, b)
    assert len(record.row("A", LOAD, "output_tok_s").rounds) == 9
    assert record.sides["B"]["begun"] == 80
    assert "answers HTTP 500" in beyond_verdicts(record)[0]


def test_no_valid_round_is_an_error(make_site: Callable[..., Site]) -> None:
    a, b = make_site(), make_site()

    def restart(number: int) -> None:
        b.engine = Engine(started=number)

    b.script = restart
    with pytest.raises(MachineError, match="no round of this window can be used"):
        run(a, b)


def test_different_loads_are_caveats(make_site: Callable[..., Site]) -> None:
    a, b = make_site(), make_site()
    b.script = lambda number: b.engine.serve(12, prompt=80, tokens=30)
    caveats = " ".join(beyond_verdicts(run(a, b)))
    for words in ("requests_per_s", "prompt_tokens", "generated_tokens"):
        assert f"{words} differ" in caveats
    b.script = lambda number: b.engine.serve(9, prompt=55, tokens=22)
    assert beyond_verdicts(run(a, b)) == []


def test_requests_that_never_end_are_a_caveat(make_site: Callable[..., Site]) -> None:
    a, b = make_site(), make_site()

    def hang(number: int) -> None:
        b.engine.serve(8)
        for _ in range(3):
            b.engine.histograms[TTFT].observe(0.1)

    b.script = hang
    (caveat,) = beyond_verdicts(run(a, b))
    assert caveat.startswith("B: 110 requests gave a first token but only 80 ended")


def test_failures_are_shares_of_each_round(make_site: Callable[..., Site]) -> None:
    a, b = make_site(), make_site()
    b.script = lambda number: b.engine.serve(8, failed=2)
    row = run(a, b).row("B", LOAD, "failed_percent")
    assert row is not None
    assert (row.value, row.rounds) == (25, (25,) * 10)
    assert run(a, b).value("B", LOAD, "http_5xx_percent") == 25


def test_engines_of_one_server_are_summed(make_site: Callable[..., Site]) -> None:
    a, b = make_site(), make_site()
    second = Histogram("x", "-", ("model_name", "engine"), buckets=BUCKETS[TTFT], registry=None)
    a.engine.registry.register(Renamed(second))
    a.script = lambda number: (a.engine.serve(8), second.labels("m", "1").observe(0.2))
    assert run(a, b).sides["A"]["begun"] == 90


class Renamed:
    """A second engine's TTFT, which a registry would refuse as a duplicate."""

    def __init__(self, histogram: Histogram) -> None:
        self.histogram = histogram

    def collect(self) -> Iterator[Any]:
        for family in self.histogram.collect():
            samples = [s._replace(name=s.name.replace("x", TTFT, 1)) for s in family.samples]
            family.name, family.samples = TTFT, samples
            yield family


def test_a_counter_that_falls_or_goes_is_a_restart() -> None:
    engine = Engine()
    engine.serve(3)
    before, fewer = Snapshot.parse(engine.text().decode(), 0), Engine()
    fewer.serve(2)
    assert Snapshot.parse(fewer.text().decode(), 1).growth_since(before) is None
    assert Snapshot.parse(engine.text().decode(), 1).growth_since(before) is not None
    engine.http.clear()
    assert Snapshot.parse(engine.text().decode(), 1).growth_since(before) is None


GOOD = Engine().text().decode()


@pytest.mark.parametrize(
    "text",
    ["", "<html>hello</html>", 'vllm:x{le="0.1', "\x00", GOOD.replace(' 0.0', " NaN"),
     GOOD.replace(" 0.0", " -1"), GOOD.replace("vllm:", "sglang:"), GOOD[:5000],
     GOOD.replace("vllm:request_prompt_tokens_sum", "other"),
     GOOD.replace("vllm:generation_tokens", "other")],
)  # fmt: skip
def test_text_that_is_not_vllms_metrics_is_refused(
    make_site: Callable[..., Site], text: str
) -> None:
    a, b = make_site(), make_site()
    b.body = text.encode()
    with pytest.raises(InputError, match=f"^server B, {b.url}/metrics: "):
        run(a, b)


def test_bytes_that_are_not_text_are_refused(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.body = b"\xff\xfe"
    with pytest.raises(InputError, match="not UTF-8"):
        Target.of("A", site.url).fetch()


def test_a_huge_answer_is_cut(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "MAX_BYTES", 2**20)
    site = make_site()
    site.body = b"x" * (2**20)
    assert len(Target.of("A", site.url).fetch()) == 2**20
    site.body += b"x"
    site.headers = {"Content-Length": str(10**9)}  # only what is read is ever held
    with pytest.raises(InputError, match="more than 1 MiB"):
        Target.of("A", site.url).fetch()


def test_a_cut_off_answer_is_refused(make_site: Callable[..., Site]) -> None:
    site = make_site()
    site.headers = {"Content-Length": "1000000"}
    with pytest.raises(MachineError, match="cannot be reached"):
        Target.of("A", site.url).fetch()


def test_a_slow_answer_is_given_up(make_site: Callable[..., Site]) -> None:
    site, done = make_site(), threading.Event()

    def drip(request: BaseHTTPRequestHandler) -> None:
        """Bytes come often enough for the socket's own timeout."""
        request.send_response(200)
        request.end_headers()
        while not done.wait(0.05):
            request.wfile.write(b"#\n")

    site.answer = drip  # type: ignore[method-assign]
    try:
        with pytest.raises(MachineError, match=r"did not answer within 0\.3 s"):
            Target.of("A", site.url).fetch(0.3)
    finally:
        done.set()


def test_redirects_are_not_followed(make_site: Callable[..., Site]) -> None:
    a, b = make_site(), make_site()
    a.status, a.headers = 302, {"Location": f"{b.url}/metrics"}
    with pytest.raises(MachineError, match="HTTP 302; redirects are not followed"):
        Target.of("A", a.url).fetch()
    assert b.reads == []


def test_the_key_comes_from_a_file(make_site: Callable[..., Site], tmp_path: Path) -> None:
    site, file = make_site(), tmp_path / "key"
    file.write_text("secret\n")
    target = Target.of("A", f"{site.url}/base/", file)
    target.fetch()
    assert site.reads[0]["Authorization"] == "Bearer secret"
    assert site.reads[0]["path"] == "/base/metrics"
    assert "secret" not in repr(target)
    for bad in ("", "two\nlines", "ümlaut"):
        file.write_text(bad)
        with pytest.raises(InputError, match="must hold one line"):
            Target.of("A", site.url, file)


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://a", "file:///etc/passwd", "http://", "http://a:b",
     "http://u:p@a", "http://a/?q=1", "http://a#f", "http://a\r\nX: y", "http://[::1", "http://ü.example"],
)  # fmt: skip
def test_addresses_that_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="server B: "):
        Target.of("B", url)


def test_a_reading_that_is_late_by_a_round_is_skipped(
    make_site: Callable[..., Site], clock: Clock
) -> None:
    a, b = make_site(), make_site()
    both = threading.Barrier(2, timeout=60)

    def stall(number: int) -> None:
        clock.now += 25 if number == 2 else 0.01
        a.engine.serve(8)
        both.wait()

    def answer_after_a(number: int) -> None:
        both.wait()
        b.engine.serve(8)

    a.script, b.script = stall, answer_after_a
    record = run(a, b)
    assert len(record.row("A", LOAD, "output_tok_s").rounds) == 9
    assert record.sides["A"]["begun"] == 72
    assert clock.now == pytest.approx(100, abs=0.1)


def test_too_few_rounds_and_one_server_twice_are_refused() -> None:
    a = Target.of("A", "http://127.0.0.1:1")
    with pytest.raises(UsageError, match="give at least 6"):
        watch(a, Target.of("B", "http://127.0.0.1:2"), 30, 5)
    with pytest.raises(UsageError, match="the same server"):
        watch(a, Target.of("B", "http://127.0.0.1:1/metrics"), 30, 6)


def test_the_command(
    make_site: Callable[..., Site], gblm: Callable[..., Outcome], tmp_path: Path
) -> None:
    a, b = make_site(), make_site(slow=0.5)
    # A busy machine misses readings; six rounds of these have to stand.
    done = gblm("bench", "watch", a.url, b.url, "--duration", 4, "--rounds", 12,
                "--output", tmp_path / "watch.json")  # fmt: skip
    assert done.code == 0, done
    assert "ttft_ms_mean: B is better; B has 0.50 times A's" in done.out
    assert "itl_ms_mean, ms" in done.out
    record = Record.read(tmp_path / "watch.json")
    assert record.baseline == "A"
    assert record.sides["B"]["url"] == f"{b.url}/metrics"
    assert record.value("B", LOAD, "ttft_ms_mean") < record.value("A", LOAD, "ttft_ms_mean")


def test_a_server_that_is_not_there_is_one_sentence(
    make_site: Callable[..., Site], gblm: Callable[..., Outcome]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        done = gblm("bench", "watch", make_site().url, url)
    assert done.code == 3
    assert done.err == f"gblm: error: server B cannot be reached at {url}/metrics: " + (
        "Connection refused.\n"
    )
