"""What tests share: the server of the tests of a running one, and a packed mixture of experts."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Once, Pack
from test_families import save_family
from vllm_server import served

from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder
from gblm.prune import prune
from gblm.recipe import LayerChoice, Recipe


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


WAYS = (("2:4", "float"), ("0.5", "int4:32"), ("8:16", "int8:32"))


@pytest.fixture(scope="session")
def mixture(once: Once) -> Path:
    """A Mixtral, each layer stored in another way and the last one's experts not packed.

    A token has all experts: of fewer it would take others where a rounding moves it over an edge.
    """

    def make(folder: Path) -> None:
        save_family(
            "mixtral", folder / "model", hidden_size=128, head_dim=32, num_hidden_layers=4,
            num_experts_per_tok=4,
        )  # fmt: skip
        layers = tuple(
            LayerChoice(targets=(f"*.layers.{index}.*",), pattern=pattern, values=values)
            for index, (pattern, values) in enumerate(WAYS)
        )
        recipe = Recipe(
            model=str(folder / "model"), method="magnitude", calibration=None, layers=layers,
            ignore=("*.layers.3.block_sparse_moe.*", "*.layers.0.block_sparse_moe.*.w2"),
        )  # fmt: skip
        prune(recipe, folder / "packed")
        export_dense(ModelFolder.open(folder / "packed"), folder / "dense")

    return once("mixture", make)
