"""A server that other machines reach: every way in asks for the key, and nothing gives it away."""

from __future__ import annotations

import http.client
import re
import shutil
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import faults
import psutil
import pytest
from conftest import Pack
from vllm_server import listening, served

from gblm.network import is_loopback
from gblm.serve.guard import ALWAYS_OPEN

KEY = "a-key-that-nobody-guesses"
OPENSSL = shutil.which("openssl")
ROUTE = re.compile(r"Route: (/\S*), (?:Methods: (\w+)|Endpoint)")
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(OPENSSL is None, reason="openssl: .ci/run installs it"),
]


@pytest.fixture(scope="module")
def address() -> str:
    """This machine as others reach it."""
    for own in psutil.net_if_addrs().values():
        for one in own:
            if one.family == socket.AF_INET and not is_loopback(one.address):
                return one.address
    pytest.skip("this machine has no address but its own 127.0.0.1")


@pytest.fixture(scope="module")
def certificate(address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [OPENSSL, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
         "-subj", "/CN=gblm", "-addext", f"subjectAltName=IP:{address},IP:127.0.0.1",
         "-keyout", folder / "key.pem", "-out", folder / "cert.pem"],
        check=True, capture_output=True,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def trusting(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=certificate / "cert.pem")


@pytest.fixture(scope="module")
def server(
    pack_tiny: Pack, certificate: Path, trusting: ssl.SSLContext
) -> Iterator[tuple[int, subprocess.Popen, str]]:
    """Port, process and log of a server with as many processes, routes and ports as it can have."""
    (certificate / "api-key").write_text(KEY)
    options = [
        "--ssl-certfile", certificate / "cert.pem", "--ssl-keyfile", certificate / "key.pem",
        "--enable-ssl-refresh", "--api-server-count", 2, "--tensor-parallel-size", 2,
    ]  # fmt: skip
    with served(
        pack_tiny(), certificate / "log", "--host", "0.0.0.0", "--api-key-file",
        certificate / "api-key", options=options, tls=trusting, VLLM_SERVER_DEV_MODE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1", VLLM_API_KEY=KEY,
    ) as (url, process, log):  # fmt: skip
        yield int(url.rpartition(":")[2]), process, log.read_text()


def status(
    address: str, port: int, tls: ssl.SSLContext, method: str, path: str, key: str | None = None
) -> int:
    """Ask on a connection of its own, which one of the API servers takes."""
    connection = http.client.HTTPSConnection(address, port, timeout=60, context=tls)
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    try:
        connection.request(method, path, headers=headers)
        return connection.getresponse().status
    finally:
        connection.close()


def test_every_route_of_every_api_server_asks_for_the_key(
    server: tuple, address: str, trusting: ssl.SSLContext
) -> None:
    port, _, log = server
    routes = {path: method or "GET" for path, method in ROUTE.findall(log)}
    assert {"/v1/completions", "/collective_rpc", "/invocations", "/metrics"} <= routes.keys()
    for path, method in routes.items():
        expected = {200} if path in ALWAYS_OPEN else {401}
        found = {status(address, port, trusting, method, path) for _ in range(4)}
        assert found == expected, (method, path)
    for key, expected in ((KEY, {200}), ("another", {401})):
        for path in ("/v1/models", "/metrics", "/server_info"):
            found = {status(address, port, trusting, "GET", path, key) for _ in range(4)}
            assert found == expected, path


def test_clients_who_speak_no_tls_or_do_not_trust_it_get_no_answer(
    server: tuple, address: str
) -> None:
    port = server[0]
    with pytest.raises(ssl.SSLCertVerificationError):
        status(address, port, ssl.create_default_context(), "GET", "/health")
    plain = http.client.HTTPConnection(address, port, timeout=60)
    plain.request("GET", "/v1/models", headers={"Authorization": f"Bearer {KEY}"})
    with pytest.raises((http.client.HTTPException, OSError)):
        plain.getresponse()
    plain.close()


def test_other_machines_reach_one_port_of_all_the_processes(server: tuple) -> None:
    port, process, _ = server
    outside = {one for one in listening(process) if not is_loopback(one[0])}
    assert outside == {("0.0.0.0", port)}


def test_no_process_tells_the_key(server: tuple) -> None:
    _, process, log = server
    root = psutil.Process(process.pid)
    family = [root, *root.children(recursive=True)]
    assert len(family) >= 6  # supervisor, vLLM, two API servers, an engine and workers
    for one in family:
        assert not any(KEY in word for word in (*one.cmdline(), *one.environ().values())), one
    assert KEY not in log


def test_a_killed_engine_turns_health_red_and_ends_the_server_with_an_error(
    server: tuple, trusting: ssl.SSLContext
) -> None:
    port, process, _ = server
    found = faults.kill_engine(
        f"https://127.0.0.1:{port}", process, "tiny", clients=4, verify=trusting,
        headers={"Authorization": f"Bearer {KEY}"},
    )  # fmt: skip
    # No clock is tested here: `make soak` measures how soon.
    assert found["health"] in (503, "closed")
    assert found["exit_code"] > 0
    assert (found["incomplete"], found["processes_left"]) == (4, 0)
