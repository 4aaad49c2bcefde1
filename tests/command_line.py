"""The command line in children of a fork server: importing torch once is enough for all tests."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

# Children have torch imported, but have never computed with it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["gblm.prune", "transformers.models.llama.modeling_llama"])


def run(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path, streams: Path
) -> None:
    """`gblm ARGUMENTS` in a folder, with its output in the files `out` and `err` of `streams`."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(streams / name, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    _look_at_the_hub_again()
    _write_without_vllm()
    sys.argv = ["gblm", *arguments]
    from gblm.cli import main

    main()


def _look_at_the_hub_again() -> None:
    """huggingface_hub reads its variables when it is imported."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = os.environ.get("HF_HUB_OFFLINE") == "1"
    constants.HF_HUB_DISABLE_XET = os.environ.get("HF_HUB_DISABLE_XET") == "1"
    constants.ENDPOINT = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)


def _write_without_vllm() -> None:
    """Tiny models write their own text in this process: vLLM would take longer to start."""
    from gblm.calibrate import own_text

    own_text._engine = lambda: own_text.in_transformers
