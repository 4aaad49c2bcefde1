"""Who may import whom. The house of docs/architecture stands or falls with this table."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"toolkit": "gblm", "export": "gblm.export", "serve": "gblm.serve"}

# Layer → the layers it may import, besides itself. A layer is the first part below gblm.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "cache": set(),
    "errors": set(),
    "provenance": {"__init__"},
    "patterns": {"errors"},
    "weights": set(),
    "values": {"errors", "weights"},
    "choices": {"errors", "formats", "patterns", "recipe", "values"},
    "progress": set(),
    "network": {"errors"},
    "structure": set(),
    "recipe": {"errors", "folder"},
    "record": {"errors", "folder", "provenance"},
    "folder": {"errors"},
    "model": {"checkpoint", "choices", "errors", "folder"},
    "data": {"errors"},
    "formats": {"errors", "patterns", "values", "weights"},
    "methods": {"errors", "patterns", "values", "weights"},
    "kernels": {"cache", "errors", "formats"},
    "layers": {"checkpoint", "errors", "model"},
    "ranks": {"errors"},
    "calibrate": {
        "checkpoint", "errors", "folder", "layers", "model", "ranks", "weights",
    },
    "loop": {"calibrate", "choices", "errors", "layers", "methods", "values", "weights"},
    "statistics": {
        "calibrate", "data", "layers", "methods", "model", "progress", "ranks", "recipe",
    },
    "steps": {"calibrate", "choices", "errors", "methods", "patterns", "recipe"},
    "output": {"checkpoint", "choices", "errors", "layers", "model", "recipe", "steps"},
    "checkpoint": {
        "choices", "errors", "folder", "formats", "patterns", "progress", "provenance", "structure",
        "values", "weights",
    },
    "packed": {"checkpoint", "errors", "folder", "formats", "hf", "kernels", "model"},
    "hf": {"checkpoint", "formats", "kernels", "packed"},
    "fetch": {"cache", "checkpoint", "errors"},
    "prune": {
        "__init__", "calibrate", "checkpoint", "choices", "folder", "layers", "loop", "model",
        "output", "progress", "provenance", "ranks", "recipe", "statistics", "steps",
    },
    "plan": {
        "calibrate", "checkpoint", "choices", "errors", "folder", "formats", "layers", "methods",
        "model", "patterns", "recipe", "steps", "structure", "values", "weights",
    },
    "evaluate": {
        "checkpoint", "data", "errors", "folder", "model", "network", "packed", "progress",
        "record",
    },
    "search": {
        "calibrate", "checkpoint", "choices", "data", "errors", "evaluate", "folder", "formats",
        "layers", "methods", "model", "patterns", "progress", "provenance", "prune", "recipe",
        "record", "values",
    },
    "bench": {
        "errors", "folder", "formats", "kernels", "network", "packed", "patterns",
        "progress", "provenance", "record", "values", "weights",
    },
    "report": {"__init__", "checkpoint", "errors", "folder", "formats", "record"},
    "doctor": {"formats", "kernels", "patterns", "provenance", "values", "weights"},
    "export": {
        "bench", "checkpoint", "choices", "errors", "evaluate", "folder", "formats", "kernels",
        "layers", "model", "packed", "patterns", "progress", "provenance", "record",
        "values", "weights",
    },
    "serve": {
        "__init__", "cache", "checkpoint", "errors", "evaluate", "export", "folder", "formats",
        "kernels", "model", "network", "packed", "patterns", "progress", "provenance", "prune",
        "recipe", "steps", "values", "weights",
    },
    "commands": {
        "bench", "checkpoint", "doctor", "errors", "evaluate", "export", "fetch", "folder",
        "methods", "network", "packed", "patterns", "plan", "provenance", "prune", "recipe",
        "record", "report", "search", "serve", "values",
    },
    "cli": {"__init__", "commands"},
}  # fmt: skip

# Package → the places that may import it.
ONLY_IN = {
    "vllm": (
        "gblm.serve.vllm_plugin",
        "gblm.serve.vllm_cli",
        "gblm.bench.vllm_linears",
        "gblm.bench.loop_vllm",
    ),
    "onnx": ("gblm.export.onnx_model",),
    "onnxruntime": ("gblm.export.onnx_model",),
    "triton": ("gblm.kernels.triton",),
    "datasets": ("gblm.data",),
    "lm_eval": ("gblm.evaluate.harness",),
    "pyarrow": ("gblm.data",),
    "matplotlib": ("gblm.report.charts",),
    "click": ("gblm.cli", "gblm.commands"),
    "rich": ("gblm.commands",),
}


def modules() -> list[tuple[str, Path]]:
    found = []
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = [package, *path.relative_to(ROOT / folder).with_suffix("").parts]
            found.append((".".join(parts), path))
    return found


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: str(value))
def test_module_imports_only_what_its_layer_may(module: str, path: Path) -> None:
    own = layer(module)
    known = set(MAY_IMPORT)
    for name in imports(path):
        if name.split(".")[0] == "gblm":
            target = layer(name)
            target = target if target in known else "__init__"
            assert target == own or target in MAY_IMPORT[own], f"{module} imports {name}"
        package = name.split(".")[0]
        if package in ONLY_IN:
            assert module.startswith(ONLY_IN[package]), f"{module} imports {name}"


def test_no_module_is_opened_as_a_pickle() -> None:
    for _, path in modules():
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "import pickle" not in text, path


@pytest.mark.parametrize("code", ["import gblm", "import gblm.cli", "import gblm.errors"])
def test_light_import_loads_no_torch(code: str) -> None:
    check = f"{code}; import sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_loads_no_torch() -> None:
    check = (
        "import sys; from gblm.cli import main; sys.argv = ['gblm', '--help']\n"
        "try: main()\nexcept SystemExit as e: assert e.code == 0\n"
        "assert 'torch' not in sys.modules and 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], capture_output=True, check=True)


def test_core_imports_without_any_optional_package() -> None:
    packages = ["vllm", "onnx", "onnxruntime", "triton", "matplotlib", "lm_eval"]
    check = (
        f"import sys; sys.modules.update(dict.fromkeys({packages}))\n"
        "import gblm.prune, gblm.packed, gblm.evaluate.perplexity, gblm.export.pack, gblm.doctor\n"
        "import gblm.serve.launch, gblm.bench.rounds, gblm.bench.server, gblm.bench.kernels\n"
        "import gblm.search.run\n"
        "import gblm.evaluate.run, gblm.evaluate.gates, gblm.evaluate.side_by_side"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
