"""An untested vLLM: refused for packed models, untouched for all others."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Run

from gblm.errors import MachineError
from gblm.serve import vllm_cli
from gblm.serve.access import Server
from gblm.serve.launch import check

DOCS = Path(__file__).parents[2] / "docs" / "serving.md"
SENTENCE = (
    "vLLM 0.99.1+cpu is installed, but gblm's packed weights were tested with 0.32, 0.33 only"
)


@pytest.fixture
def untested(tmp_path: Path) -> dict[str, str]:
    """Environment of a process that finds another version of vLLM's distribution."""
    info = tmp_path / "other" / "vllm-0.99.1+cpu.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.99.1+cpu\n")
    paths = [str(info.parent), os.environ.get("PYTHONPATH", "")]
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def run(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("version", "tested"),
    [("0.32.0", True), ("0.33.7+cpu", True), ("0.320.0", False), ("0.3.2", False),
     ("unknown", False)],
)  # fmt: skip
def test_only_patches_of_tested_releases_are_tested(version: str, tested: bool) -> None:
    assert vllm_cli.is_tested(version) is tested


@pytest.mark.vllm
def test_serve_refuses_a_packed_model_before_vllm_starts(
    gblm: Run, packed: Path, untested: dict[str, str]
) -> None:
    done = gblm("serve", packed, **untested)
    assert done.code == 3, done
    assert SENTENCE in done.err
    assert "GBLM_ALLOW_UNTESTED_VLLM=1" in done.err
    assert "starting" not in done.err


@pytest.mark.vllm
def test_override_and_dense_models_pass(
    packed: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_cli, "vllm_version", lambda: "0.320.0")
    check(Server(tiny))
    with pytest.raises(MachineError, match=r"0\.320\.0 is installed"):
        check(Server(packed))
    monkeypatch.setenv("GBLM_ALLOW_UNTESTED_VLLM", "1")
    check(Server(packed))


@pytest.mark.vllm
def test_plugin_registers_cheaply_and_refuses_when_a_packed_model_is_loaded(
    untested: dict[str, str],
) -> None:
    code = (
        "import os, sys, gblm.serve.vllm_plugin as p; assert 'torch' not in sys.modules\n"
        "p.register(); p.register()\n"
        "from vllm.model_executor.layers.quantization import get_quantization_config as g\n"
        "for _ in range(2):\n"
        "    try: g('gblm').from_config({})\n"
        "    except Exception as error: print(type(error).__name__, error)\n"
        "    os.environ['GBLM_ALLOW_UNTESTED_VLLM'] = '1'"
    )
    told = run(code, untested)
    assert told.count(f"MachineError {SENTENCE}") == 1
    assert "\nCheckpointError " in told


@pytest.mark.vllm
def test_plugin_that_does_not_fit_leaves_an_untested_vllm_alone(untested: dict[str, str]) -> None:
    broken = (
        "import sys; sys.modules['vllm.model_executor.layers.quantization'] = None\n"
        "import gblm.serve.vllm_plugin as p\n"
    )
    log = run(f"{broken}p.register()", untested)
    assert "packed models cannot be served by vLLM 0.99.1+cpu" in log
    code = f"{broken}try: p.register()\nexcept ImportError: print('raised')"
    assert "raised" in run(code, {})


@pytest.mark.parametrize("release", vllm_cli.TESTED_VERSIONS)
def test_documentation_lists_every_tested_release(release: str) -> None:
    assert f"\n| {release}." in DOCS.read_text()
