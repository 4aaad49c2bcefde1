from __future__ import annotations

import itertools
import shutil
import sys
from pathlib import Path

import pytest
from conftest import Pack

from gblm.errors import CheckpointError, InputError, UsageError
from gblm.export.dense import export_dense
from gblm.model.folder import ModelFolder
from gblm.serve import launch
from gblm.serve.access import Server
from gblm.serve.launch import (
    check,
    check_options,
    command,
    environment,
    loading_options,
)


def test_command_is_vllms_own_server_with_safe_defaults(tmp_path: Path) -> None:
    words = command(Server(tmp_path / "model-a", name="a", options=("--enforce-eager",)))
    assert words[:5] == [
        sys.executable,
        "-m",
        "gblm.serve.supervise",
        "serve",
        str(tmp_path / "model-a"),
    ]
    pairs = dict(itertools.pairwise(words))
    assert pairs["--host"] == "127.0.0.1"
    assert pairs["--served-model-name"] == "a"
    assert pairs["--shutdown-timeout"] == "30"
    assert words[-3] == "--enforce-eager"


def test_vllm_is_told_to_miss_what_a_packed_folder_lacks(packed: Path, tiny: Path) -> None:
    option = "--model-loader-extra-config"
    server = Server(packed, options=(option, "{}"))
    assert loading_options(server) == [option, '{"enable_weights_track": true}']
    # The user's comes later and wins.
    words = command(server, loading_options(server))
    assert words[-6:-2] == [*loading_options(server), option, "{}"]
    assert loading_options(Server(tiny)) == []
    for option in ("--load-format", "--load_format", "--load-f"):
        assert loading_options(Server(packed, options=(option, "fastsafetensors"))) == []


def test_cpu_environment_bounds_the_cache_and_binds_all_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "on_cpu", lambda: True)
    env = environment(Server(tmp_path, backend="dense"), {})
    assert 1 <= int(env["VLLM_CPU_KVCACHE_SPACE"]) <= launch.MAX_KV_CACHE_GIB
    assert env["VLLM_CPU_OMP_THREADS_BIND"]
    assert env["GBLM_BACKEND"] == "dense"
    for option in ("--tensor-parallel-size", "--tensor_parallel_size", "--tens", "-tp"):
        env = environment(Server(tmp_path, options=(option, "2")), {})
        assert "VLLM_CPU_OMP_THREADS_BIND" not in env
    for option in ("--kv-cache-memory-bytes", "--kv_cache_memory_bytes", "--kv-cache-mem"):
        env = environment(Server(tmp_path, options=(option, "256M")), {})
        assert "VLLM_CPU_KVCACHE_SPACE" not in env


def test_what_the_user_set_wins(tmp_path: Path) -> None:
    mine = {
        "VLLM_CPU_KVCACHE_SPACE": "7",
        "VLLM_CPU_OMP_THREADS_BIND": "0",
        "VLLM_NO_USAGE_STATS": "0",
        "GLOO_SOCKET_IFNAME": "eth0",
        "SAGEMAKER_MODEL_PATH": "/mine",
        "VLLM_MAX_N_SEQUENCES": "8",
    }
    env = environment(Server(tmp_path), mine)
    assert {key: env[key] for key in mine} == mine


def test_gpu_environment_sets_no_cpu_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "on_cpu", lambda: False)
    assert not [key for key in environment(Server(tmp_path), {}) if key.startswith("VLLM_CPU")]


def test_workers_of_one_machine_meet_on_it_alone(tmp_path: Path) -> None:
    for options, expected in ((("-tp", "2"), "lo"), (("--nnodes", "2"), None)):
        env = environment(Server(tmp_path, options=options), {})
        assert (env.get("GLOO_SOCKET_IFNAME"), env.get("NCCL_SOCKET_IFNAME")) == (expected,) * 2


def test_no_code_beside_a_model_is_run_and_a_request_may_ask_for_few_answers(
    tmp_path: Path,
) -> None:
    found = environment(Server(tmp_path), {})
    assert found["SAGEMAKER_MODEL_PATH"] == "/dev/null"
    assert found["VLLM_MAX_N_SEQUENCES"] == "64"


@pytest.mark.parametrize(
    ("cores", "text"), [([0, 1], "0-1"), ([0, 2, 3, 4, 7], "0,2-4,7"), ([5], "5")]
)
def test_core_lists_are_written_as_ranges(cores: list[int], text: str) -> None:
    assert launch._ranges(cores) == text


def test_api_key_never_stands_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    server = Server(tmp_path, api_key_file=tmp_path / "key")
    assert not [word for word in command(server) if "secret" in word]
    (tmp_path / "key").write_text("\n")
    with pytest.raises(InputError, match="one line of ASCII"):
        environment(server, {})


@pytest.mark.vllm
def test_what_cannot_be_served_is_refused_before_vllm_starts(pack_tiny: Pack, tiny: Path) -> None:
    check(Server(pack_tiny()))
    check(Server(tiny))
    with pytest.raises(UsageError, match="'cuda' is unknown"):
        check_options(Server(pack_tiny(), backend="cuda"))


@pytest.mark.vllm
def test_zeros_of_a_dense_folder_are_told(
    pack_tiny: Pack, tiny: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "gblm")
    export_dense(ModelFolder.open(pack_tiny()), tmp_path / "zeros")
    check(Server(tiny))
    assert "--pack" not in caplog.text
    check(Server(tmp_path / "zeros"))
    assert "about 50 % of the weights are zero: --pack serves it packed" in caplog.text
    with pytest.raises(InputError, match="--pack packs the zeros"):
        check(Server(tmp_path / "zeros", backend="reference"))


@pytest.mark.vllm
def test_a_pickle_or_a_damaged_file_never_reaches_vllm(tiny: Path, packed: Path) -> None:
    path = packed / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="no intact safetensors"):
        check(Server(packed))
    path.rename(packed / "pytorch_model.bin")
    shutil.copy(tiny / "config.json", packed)
    with pytest.raises(InputError, match="a pickle"):
        check(Server(packed))
