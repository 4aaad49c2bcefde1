"""`gblm export hub`: the real client of the hub, against a small hub that notes every call."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, Run
from huggingface_hub import ModelCard

TOKEN = "hf_of_the_test"


class Hub(ThreadingHTTPServer):
    """One repository, and every call to it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Call)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.calls: list[str] = []
        self.tokens: set[str | None] = set()
        self.visibility: str | None = None
        self.files: dict[str, bytes] = {}
        self.stored: dict[str, bytes] = {}
        self.refuses = 0

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """What the hub would say; its files change with the commit alone."""
        if self.refuses:
            return self.refuses, {"error": "no right to write"}
        if method == "PUT":
            self.stored[path.rpartition("/")[2]] = body
            return 200, {}
        answers = {
            "POST /api/repos/create": self._create,
            "GET /api/models/me/tiny": self._info,
            "GET /api/models/me/tiny/tree/main": self._tree,
            "POST /api/validate-yaml": self._check_card,
            "POST /api/models/me/tiny/preupload/main": self._ways,
            "POST /me/tiny.git/info/lfs/objects/batch": self._places,
            "POST /api/models/me/tiny/commit/main": self._commit,
        }
        return answers[f"{method} {path}"](body)

    def _create(self, body: bytes) -> tuple[int, Any]:
        is_new, asked = self.visibility is None, json.loads(body)
        assert asked["name"] == "tiny"
        self.visibility = self.visibility or asked["visibility"]
        return 200 if is_new else 409, {"url": f"{self.url}/me/tiny"}

    def _info(self, _: bytes) -> tuple[int, Any]:
        return 200, {"id": "me/tiny", "private": self.visibility == "private", "sha": "0" * 40}

    def _tree(self, _: bytes) -> tuple[int, Any]:
        return 200, [
            {"type": "file", "path": name, "size": len(data), "oid": "0"}
            for name, data in self.files.items()
        ]

    def _check_card(self, body: bytes) -> tuple[int, Any]:
        assert ModelCard(json.loads(body)["content"]).data.base_model
        return 200, {"warnings": [], "errors": []}

    def _ways(self, body: bytes) -> tuple[int, Any]:
        return 200, {
            "files": [
                {
                    "path": one["path"],
                    "shouldIgnore": False,
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                }
                for one in json.loads(body)["files"]
            ]
        }

    def _places(self, body: bytes) -> tuple[int, Any]:
        return 200, {
            "transfer": "basic",
            "objects": [
                one | {"actions": {"upload": {"href": f"{self.url}/stored/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ],
        }

    def _commit(self, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[value["path"]]
        return 200, {"commitUrl": f"{self.url}/me/tiny/commit/1", "commitOid": "1" * 40}


class Call(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self._chunks()
        path = self.path.partition("?")[0]
        if path == "/api/agent-harnesses":  # the client asks for itself, whatever it does
            self.send_error(404)
            return
        self.server.calls.append(f"{self.command} {path}")
        if self.command != "PUT":
            self.server.tokens.add(self.headers.get("Authorization"))
        status, answer = self.server.answer(self.command, path, body)
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_POST = do_PUT = do_GET

    def _chunks(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return b""
        whole = b""
        while size := int(self.rfile.readline(), 16):
            whole += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return whole

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def push(gblm: Run, hub: Hub) -> Run:
    def run(*words: object, **environment: str) -> Outcome:
        known = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        return gblm("export", "hub", *words, **{**known, "HF_TOKEN": TOKEN, **environment})

    return run


def test_every_file_arrives_in_a_private_repository(push: Run, hub: Hub, packed: Path) -> None:
    done = push(packed, "tiny")
    assert done.code == 0, done
    assert done.out == f"{hub.url}/me/tiny/commit/1: you and who you let can read it\n"
    assert hub.visibility == "private"
    assert hub.files == {path.name: path.read_bytes() for path in packed.iterdir()}
    weights = (packed / "model.safetensors").read_bytes()
    assert hub.stored == {hashlib.sha256(weights).hexdigest(): weights}
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert len([call for call in hub.calls if "/commit/" in call]) == 1


def test_a_second_push_replaces_weights_and_keeps_what_others_added(
    push: Run, hub: Hub, packed: Path
) -> None:
    hub.visibility = "private"
    left = "model-00001-of-00002.safetensors"
    hub.files = {left: b"old", "picture.png": b"x", ".gitattributes": b"y"}
    done = push(packed, "me/tiny", "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["private"] is True
    assert hub.files.keys() == {path.name for path in packed.iterdir()} | {
        "picture.png", ".gitattributes"
    }  # fmt: skip


def test_public_is_asked_for_each_time(push: Run, hub: Hub, packed: Path) -> None:
    done = push(packed, "tiny", "--public")
    assert done.out.endswith(": everybody can read it\n"), done
    assert hub.visibility == "public"
    hub.calls.clear()
    done = push(packed, "tiny")
    assert done.code == 2, done
    assert "me/tiny is there already, and everybody can read it: pass --public" in done.err
    assert hub.calls == ["POST /api/repos/create", "GET /api/models/me/tiny"]


def test_a_damaged_folder_is_not_pushed(push: Run, hub: Hub, packed: Path) -> None:
    with (packed / "tokenizer.json").open("a") as file:
        file.write(" ")
    done = push(packed, "tiny")
    assert (done.code, hub.calls) == (4, []), done


@pytest.mark.parametrize(
    ("name", "status", "environment"),
    [("tiny", 403, {}), ("a/b/c", 0, {}), ("tiny", 0, {"HF_HUB_OFFLINE": "1"}),
     ("tiny", 0, {"HF_ENDPOINT": "http://127.0.0.1:1"})],
)  # fmt: skip
def test_what_the_hub_or_the_way_to_it_refuses_is_one_sentence(
    push: Run, hub: Hub, packed: Path, name: str, status: int,
    environment: dict[str, str],
) -> None:  # fmt: skip
    hub.refuses = status
    done = push(packed, name, **environment)
    assert done.code == 3, done
    assert done.err.startswith(f"gblm: error: {name}: the hub did not take the folder (")
    assert done.err.count("\n") == 1
    assert TOKEN not in done.err
