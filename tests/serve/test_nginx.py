"""deploy/nginx.conf in a real nginx, in front of a small upstream that says what reached it."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from gblm.bench.server import free_port

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:/usr/local/bin")
CONF = Path(__file__).parents[2] / "deploy" / "nginx.conf"
PARTS = (b"one\n\n", b"two\n\n", b"end\n\n")
pytestmark = pytest.mark.skipif(NGINX is None, reason="nginx: .ci/run installs it")


class Upstream(ThreadingHTTPServer):
    """In vLLM's place: answers with what it was asked; streams part by part."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[str] = []
        self.go_on = threading.Semaphore(0)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Upstream

    def do_GET(self) -> None:
        self.server.seen.append(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path.endswith("?stream"):
            return self._stream(chunked=body == b"chunked")
        answer = {"path": self.path, "method": self.command, "size": len(body),
                  "authorization": self.headers.get("Authorization")}  # fmt: skip
        text = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)
        return None

    do_POST = do_DELETE = do_PUT = do_GET

    def _stream(self, chunked: bool) -> None:
        self.send_response(200)
        self.send_header(*("Transfer-Encoding", "chunked") if chunked else ("Connection", "close"))
        self.end_headers()
        for part in PARTS:
            self.wfile.write(b"5\r\n" + part + b"\r\n" if chunked else part)
            self.server.go_on.acquire(timeout=20)
        if chunked:
            self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def port(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder, port = tmp_path_factory.mktemp("nginx"), free_port()
    text = CONF.read_text()
    for shipped, here in (
        ("listen 8080;", f"listen 127.0.0.1:{port};"),
        ("server 127.0.0.1:8000;", f"server 127.0.0.1:{upstream.server_port};"),
    ):
        assert text.count(shipped) == 1
        text = text.replace(shipped, here)
    (folder / "gblm.conf").write_text(text)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    (folder / "main.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log stderr; events {{}}\n"
        f"http {{ access_log off; {paths} include {folder}/gblm.conf; }}\n"
    )
    log = (folder / "log").open("wb")
    words = [str(NGINX), "-p", str(folder), "-e", "stderr", "-c", str(folder / "main.conf")]
    process = subprocess.Popen(words, stdout=log, stderr=log)
    for _ in range(200):
        with socket.socket() as probe:
            if process.poll() is not None or probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    assert process.poll() is None, (folder / "log").read_text()
    yield port
    process.terminate()
    process.wait(20)
    log.close()


def ask(
    port: int, method: str, path: str, body: bytes | Iterator[bytes] | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, headers, encode_chunked=not isinstance(body, bytes))
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/chat/completions"), ("POST", "/v1/completions"), ("GET", "/v1/models"),
     ("GET", "/health")],
)  # fmt: skip
def test_the_four_routes_pass_with_their_key(port: int, method: str, path: str) -> None:
    body = b"{}" if method == "POST" else None
    status, text = ask(port, method, path, body, Authorization="Bearer secret")
    assert status == 200
    assert json.loads(text) == {
        "path": path, "method": method, "size": len(body or b""), "authorization": "Bearer secret",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [("GET", "/metrics", 404), ("POST", "/tokenize", 404), ("POST", "/pause", 404),
     ("POST", "/invocations", 404), ("GET", "/docs", 404), ("GET", "/", 404),
     ("POST", "/v1/embeddings", 404), ("GET", "/v1/models/x", 404), ("GET", "/v1/completions", 403),
     ("POST", "/v1/models", 403), ("DELETE", "/v1/chat/completions", 403), ("POST", "/health", 403),
     ("GET", "/health/../metrics", 404), ("GET", "/v1/%2e%2e/metrics", 404)],
)  # fmt: skip
def test_nothing_else_reaches_vllm(
    port: int, upstream: Upstream, method: str, path: str, expected: int
) -> None:
    upstream.seen.clear()
    assert ask(port, method, path, b"{}" if method == "POST" else None)[0] == expected
    assert upstream.seen == []


@pytest.mark.parametrize("path", ["/metrics/../v1/models", "//v1//models", "/v1/%6dodels"])
def test_vllm_sees_the_listed_path_however_it_was_spelled(
    port: int, upstream: Upstream, path: str
) -> None:
    upstream.seen.clear()
    assert ask(port, "GET", path)[0] == 200
    assert upstream.seen == ["/v1/models"]


def test_a_body_that_is_too_large_is_refused(port: int, upstream: Upstream) -> None:
    upstream.seen.clear()
    limit = 2 * 2**20
    status, text = ask(port, "POST", "/v1/completions", b"x" * limit)
    assert (status, json.loads(text)["size"]) == (200, limit)
    upstream.seen.clear()
    # Announced by its length; the body itself is not sent, for nginx hangs up at once.
    announced = {"Content-Length": str(limit + 1)}
    assert ask(port, "POST", "/v1/completions", b"", **announced)[0] == 413
    assert ask(port, "POST", "/v1/completions", iter([b"x" * limit, b"x"]))[0] == 413
    assert upstream.seen == []


# nginx holds back what it buffers only where it does not know the length of a part.
@pytest.mark.parametrize("kind", [b"chunked", b"closed"])
def test_tokens_pass_as_they_come(port: int, upstream: Upstream, kind: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", "/v1/completions?stream", kind)
    answer = connection.getresponse()
    for part in PARTS:
        assert answer.read1(64) == part
        upstream.go_on.release()  # upstream goes on only after this part has arrived here
    assert answer.read() == b""
    connection.close()
