"""The one server that the tests of a running server share."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Pack
from vllm_server import served


@pytest.fixture(scope="session")
def server(
    pack_tiny: Pack, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, subprocess.Popen, Path]]:
    """URL, process and log; test_server_stops.py, which comes last, ends it."""
    folder = tmp_path_factory.mktemp("serve")
    model = Path(shutil.copytree(pack_tiny(), folder / "model"))
    # What a chat model has besides.
    (model / "chat_template.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates/tool_use.jinja").write_text("{{ tools | length }} tools")
    (model / "generation_config.json").write_text(json.dumps({"do_sample": True, "top_k": 7}))
    with served(model, folder / "log") as running:
        yield running


@pytest.fixture
def client(server: tuple) -> object:
    openai = pytest.importorskip("openai", reason="the openai client: make dev installs it")
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", timeout=60)
