"""Each kind of damage is refused in one sentence by every road to a kernel, and before one runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Pack, Run
from damage import DAMAGES, UP, damaged, rehash

from gblm import kernels
from gblm.checkpoint.inspect import verify
from gblm.errors import InputError
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
from gblm.packed import check_loadable, load

Watched = list[str]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Every call of a backend's `prepare` or `linear`: packing a layout, or multiplying."""
    calls: Watched = []
    for backend in kernels.BACKENDS.values():
        for name in ("prepare", "linear"):
            own = getattr(type(backend), name)

            def spy(*arguments: object, _own: Callable = own, _name: str = name) -> object:
                calls.append(_name)
                return _own(*arguments)

            monkeypatch.setattr(type(backend), name, spy)
    return calls


@pytest.fixture(params=DAMAGES)
def refusable(request: pytest.FixtureRequest, pack_tiny: Pack, tmp_path: Path) -> tuple[Path, str]:
    """A damaged folder, and words of its refusal."""
    base, damage, match = DAMAGES[request.param]
    return damaged(pack_tiny("wanda", *base), tmp_path / "packed", damage), match


def refused(action: Callable[[], object], match: str, ran: Watched) -> None:
    with pytest.raises(InputError, match=match) as error:
        action()
    assert "\n" not in str(error.value)
    assert not ran


def through_vllm(folder: Path) -> None:
    """What `gblm serve` and vLLM do with a folder, for one linear and without an engine."""
    from gblm.serve.access import Server
    from gblm.serve.launch import check
    from gblm.serve.vllm_plugin.config import SparseConfig
    from gblm.serve.vllm_plugin.linear import SparseLinearMethod

    check(Server(folder))
    fields = json.loads((folder / "config.json").read_text())["quantization_config"]
    fmt = SparseConfig.from_config(fields).manifest.format_of(UP)
    assert fmt is not None
    with PackedReader(ModelFolder.open(folder)) as packed:
        (rows, columns), parts = packed.linears[UP].shape, packed.parts(UP)
    method, layer = SparseLinearMethod(fmt, UP, lambda *choice: None), torch.nn.Module()
    method.create_weights(
        layer, columns, [rows], columns, rows, torch.bfloat16, weight_loader=lambda *args: None
    )
    for name, tensor in parts.items():
        getattr(layer, name).load_column_parallel_weight(loaded_weight=tensor)
    method.process_weights_after_loading(layer)


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor import parameter

    monkeypatch.setattr(parameter, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(parameter, "get_tensor_model_parallel_world_size", lambda: 1)


def test_damage_is_refused_by_load_and_by_verify(refusable: tuple[Path, str], ran: Watched) -> None:
    folder, match = refusable
    refused(lambda: load(folder), match, ran)
    opened = ModelFolder.open
    refused(lambda: (check_loadable(opened(folder)), verify(opened(folder))), match, ran)


def test_the_command_verify_holds_the_folder_against_its_config(packed: Path, gblm: Run) -> None:
    DAMAGES["missing norm"][1](packed)
    rehash(packed)
    verify(ModelFolder.open(packed))
    done = gblm("inspect", packed, "--verify")
    assert done.code == 4
    assert "model.norm.weight is missing" in done.err


@pytest.mark.vllm
@pytest.mark.usefixtures("one_rank")
def test_damage_is_refused_on_the_road_to_vllm(refusable: tuple[Path, str], ran: Watched) -> None:
    folder, match = refusable
    refused(lambda: through_vllm(folder), match, ran)


@pytest.mark.vllm
@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("base", sorted({base for base, _, _ in DAMAGES.values()}))
def test_intact_folders_pass_all_roads(
    pack_tiny: Pack, ran: Watched, base: tuple[str, str]
) -> None:
    folder = pack_tiny("wanda", *base)
    load(folder)
    assert "prepare" in ran
    verify(ModelFolder.open(folder))
    ran.clear()
    through_vllm(folder)
    assert ran == ["prepare"]
