"""Who may import whom. The house of docs/architecture stands or falls with this table."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"toolkit": "gblm", "export": "gblm.export", "serve": "gblm.serve"}

# Layer → the layers it may import, besides itself. A layer is the first part below gblm.
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "cache": {"errors"},
    "errors": set(),
    "progress": set(),
    "data": {"errors"},
    "files": {"errors"},
    "network": {"errors"},
    "provenance": {"__init__"},
    "sparse": {"errors"},
    "kernels": {"cache", "errors", "sparse"},
    "methods": {"errors", "sparse"},
    "recipe": {"cache", "errors", "files"},
    "record": {"errors", "files", "provenance"},
    "doctor": {"kernels", "provenance", "sparse"},
    "model": {"errors", "files", "recipe", "sparse"},
    "calibrate": {
        "cache", "data", "errors", "files", "model", "progress", "recipe", "sparse",
    },
    "checkpoint": {
        "cache", "errors", "files", "model", "progress", "provenance", "recipe", "sparse",
    },
    "packed": {"errors", "kernels", "model", "sparse"},
    "bench": {
        "errors", "kernels", "model", "network", "packed", "progress", "provenance",
        "record", "sparse",
    },
    "evaluate": {
        "cache", "checkpoint", "data", "errors", "export", "files", "model", "network", "packed",
        "progress", "recipe", "record",
    },
    "fetch": {"cache", "checkpoint", "errors"},
    "prune": {
        "__init__", "calibrate", "checkpoint", "data", "errors", "files", "methods",
        "model", "progress", "provenance", "recipe", "recover", "sparse",
    },
    "report": {"__init__", "checkpoint", "errors", "files", "model", "record"},
    "export": {
        "bench", "cache", "checkpoint", "errors", "files", "kernels", "model", "packed",
        "progress", "provenance", "recipe", "sparse",
    },
    "recover": {
        "calibrate", "checkpoint", "data", "errors", "files", "model", "packed", "progress",
        "provenance", "recipe", "sparse",
    },
    "search": {
        "calibrate", "errors", "methods", "model", "progress", "prune", "recipe", "sparse",
    },
    "serve": {
        "__init__", "cache", "checkpoint", "errors", "export", "files",
        "kernels", "methods", "model", "network", "packed", "progress", "provenance",
        "prune", "recipe", "sparse",
    },
    "commands": {
        "bench", "checkpoint", "doctor", "errors", "evaluate", "export", "fetch", "files",
        "methods", "model", "network", "packed", "progress", "provenance", "prune", "recipe",
        "record", "recover", "report", "search", "serve", "sparse",
    },
    "cli": {"__init__", "commands"},
    "__main__": {"cli"},
}  # fmt: skip

# Package → the places that may import it.
ONLY_IN = {
    "vllm": (
        "gblm.serve.vllm_plugin",
        "gblm.serve.vllm_cli",
        "gblm.serve.sample",
        "gblm.bench.linears",
        "gblm.bench.loops",
    ),
    "onnx": (),
    "onnx_ir": ("gblm.export.onnx",),
    "onnxruntime": (),
    "onnxruntime_genai": ("gblm.export.onnx.decoder",),
    "triton": ("gblm.kernels.triton",),
    "datasets": ("gblm.data",),
    "lm_eval": ("gblm.evaluate.harness",),
    "pyarrow": ("gblm.data",),
    "matplotlib": ("gblm.report.figures",),
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


def is_allowed(module: str, name: str) -> bool:
    """Whether a module may import a name."""
    package, own = name.split(".")[0], layer(module)
    if package == "gblm":
        target = layer(name) if layer(name) in MAY_IMPORT else "__init__"
        return target == own or target in MAY_IMPORT[own]
    return package not in ONLY_IN or module.startswith(ONLY_IN[package])


def test_modules_import_only_what_their_layer_may() -> None:
    found = [(module, name) for module, path in modules() for name in sorted(imports(path))]
    assert len(found) > 1000
    assert [f"{module} imports {name}" for module, name in found
            if not is_allowed(module, name)] == []  # fmt: skip


def test_no_module_imports_one_that_imports_it() -> None:
    known = {name.removesuffix(".__init__"): path for name, path in modules()}
    graph = {}
    for name, path in known.items():
        found = {one if one in known else one.rpartition(".")[0] for one in imports(path)}
        graph[name] = (found & known.keys()) - {name}
    # A ring is a CycleError, whose text lists the modules.
    assert len(list(TopologicalSorter(graph).static_order())) == len(known)


def test_no_module_is_opened_as_a_pickle() -> None:
    for _, path in modules():
        text = path.read_text()
        assert "torch.load(" not in text, path
        assert "import pickle" not in text, path


def test_help_completion_and_mistakes_are_answered_without_torch() -> None:
    """It takes a second to import."""
    check = (
        "import gblm, gblm.errors, importlib, sys; from gblm.cli import COMMANDS, main\n"
        "sys.argv = ['gblm', '--help']\n"
        "try: main()\nexcept SystemExit as e: assert e.code == 0\n"
        "assert 'rich' not in sys.modules\n"
        "for module, _ in COMMANDS.values(): importlib.import_module(module)\n"
        "assert not {'torch', 'transformers'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", check], capture_output=True, check=True)


def test_core_imports_without_any_optional_package() -> None:
    packages = ["vllm", "onnx", "onnx_ir", "onnxruntime", "triton", "matplotlib", "lm_eval"]
    check = (
        f"import sys; sys.modules.update(dict.fromkeys({packages}))\n"
        "import gblm.prune, gblm.packed, gblm.evaluate.perplexity, gblm.export.pack, gblm.doctor\n"
        "import gblm.serve.launch, gblm.bench.rounds, gblm.bench.server, gblm.bench.kernels\n"
        "import gblm.search.candidates\n"
        "import gblm.evaluate.run, gblm.evaluate.gates"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
