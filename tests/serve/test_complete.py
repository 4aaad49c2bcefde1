"""What was not loaded is never served: parts, pieces, whole linears, norms; vLLM keeps no account.

Of quantized models it does so on demand only, and `gblm serve` demands it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import damaged, tensors
from vllm_linear import RANKS, SHAPE, create, load_columns, load_pieces
from weights import weight_of

from gblm.errors import CheckpointError
from gblm.serve.launch import LOADER_CONFIG
from gblm.sparse.formats import from_spec

pytestmark = pytest.mark.vllm
FORMATS = ("nm/2:4", "bitmask/0.5", "dense/dense")
VALUES = ("float", "int8:64", "int4:row")
SPECS = [f"{fmt}/{values}".removesuffix("/float") for fmt in FORMATS for values in VALUES]
ROWS, COLUMNS = SHAPE


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("spec", SPECS)
def test_each_part_is_missed_where_columns_are_cut(
    spec: str, rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt = from_spec(spec)
    whole = fmt.pack("w", weight_of(fmt, SHAPE))
    for missing in fmt.parts:
        method, layer = create(fmt, [ROWS], COLUMNS, RANKS, monkeypatch, rank)
        load_columns(layer, {part: whole[part] for part in whole if part != missing})
        with pytest.raises(CheckpointError, match=r"^w"):
            method.process_weights_after_loading(layer)
    method, layer = create(fmt, [ROWS], COLUMNS, RANKS, monkeypatch, rank)
    load_columns(layer, whole)
    method.process_weights_after_loading(layer)


@pytest.mark.parametrize("spec", SPECS)
def test_each_part_of_each_piece_is_missed_where_rows_are_cut(
    spec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, half = from_spec(spec), ROWS // RANKS
    whole = fmt.pack("w", weight_of(fmt, SHAPE))
    for missing in (*({part} for part in whole), set(whole)):
        lacking = {part: whole[part] for part in whole.keys() - missing}
        for pieces in ([lacking, whole], [whole, lacking]):
            method, layer = create(fmt, [half, half], COLUMNS, 1, monkeypatch, 1)
            load_pieces(layer, pieces, [half, half])
            with pytest.raises(CheckpointError, match=r"^w"):
                method.process_weights_after_loading(layer)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's process groups of a single rank; the environment stays what it was."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        init_distributed_environment,
        initialize_model_parallel,
    )

    before = dict(os.environ)
    meeting = tmp_path_factory.mktemp("ranks") / "meeting"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        initialize_model_parallel()
    yield
    cleanup_dist_env_and_memory()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def load(one_rank: None) -> Callable[[Path], Any]:
    """vLLM's own loader on a folder, with the settings of `gblm serve`."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader

    # As vLLM's CPU worker does.
    torch.accelerator.empty_cache = lambda: None

    def run(folder: Path) -> Any:
        config = EngineArgs(
            str(folder), max_model_len=64, enforce_eager=True,
            model_loader_extra_config=LOADER_CONFIG,
        ).create_engine_config()  # fmt: skip
        with set_current_vllm_config(config):
            loader = get_model_loader(config.load_config)
            return loader.load_model(vllm_config=config, model_config=config.model_config)

    return run


@pytest.fixture(scope="module")
def partly(tiny_untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Packed folders in which `down_proj` and the head stay dense, one per pattern."""
    from gblm.prune import prune
    from gblm.recipe import Recipe

    made: dict[str, Path] = {}

    def get(pattern: str) -> Path:
        if pattern not in made:
            made[pattern] = tmp_path_factory.mktemp("partly") / "out"
            recipe = Recipe(model=str(tiny_untied), method="magnitude", pattern=pattern,
                            calibration=None, ignore=("down_proj",))  # fmt: skip
            prune(recipe, made[pattern])
        return made[pattern]

    return get


LAYER = "model.layers.1"
GONE = [
    *((pattern, f"{LAYER}.{name}.", f"{LAYER}.{fused}") for pattern in ("2:4", "0.5")
      for name, fused in (("self_attn.k_proj", "self_attn.qkv_proj"),
                          ("mlp.gate_proj", "mlp.gate_up_proj"),
                          ("self_attn.o_proj", "self_attn.o_proj"))),
    ("2:4", f"{LAYER}.mlp.down_proj.", f"{LAYER}.mlp.down_proj: values are missing"),
    ("2:4", "model.embed_tokens.", "embed_tokens: values are missing"),
    ("2:4", "lm_head.", "lm_head: values are missing"),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "prefix", "match"), GONE)
def test_vllm_refuses_what_lacks_a_linear_or_an_embedding(
    partly: Callable[[str], Path], tmp_path: Path, pattern: str, prefix: str, match: str,
    load: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from gblm.serve import launch

    def drop(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.startswith(prefix)]:
            del weights[name]

    # Ours is the refusal, not that of the account.
    monkeypatch.setitem(launch.LOADER_CONFIG, "enable_weights_track", False)
    with pytest.raises(CheckpointError, match=match):
        load(damaged(partly(pattern), tmp_path / "out", tensors(drop)))


@pytest.mark.parametrize(
    ("prefix", "match"),
    [("1.block_sparse_moe.experts.2.w3.", "experts.2.w3: parts of its weight are missing"),
     ("0.block_sparse_moe.experts.1.w2.", "experts.1.w2: parts of its weight are missing"),
     ("3.block_sparse_moe.experts.3.w1.", "layers.3.block_sparse_moe.experts: values are missing"),
     ("3.block_sparse_moe.experts.0.w2.", "layers.3.block_sparse_moe.experts: values are missing")],
)  # fmt: skip
def test_vllm_refuses_what_lacks_a_linear_of_an_expert(
    mixture: Path, tmp_path: Path, prefix: str, match: str, load: Callable[[Path], Any]
) -> None:
    """Packed ones, of which some linears or whole layers are not."""

    def drop(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if name.startswith(f"model.layers.{prefix}")]:
            del weights[name]

    with pytest.raises(CheckpointError, match=match):
        load(damaged(mixture / "packed", tmp_path / "out", tensors(drop)))


def test_norm_that_was_never_loaded_is_missed_by_the_account(
    partly: Callable[[str], Path], tmp_path: Path, load: Callable[[Path], Any]
) -> None:
    name = f"{LAYER}.input_layernorm.weight"
    folder = damaged(partly("0.5"), tmp_path / "out", tensors(lambda weights: weights.pop(name)))
    with pytest.raises(ValueError, match=f"not initialized.*{name}"):
        load(folder)
    assert load(partly("0.5")) is not None


@pytest.mark.parametrize(
    "name",
    [f"{LAYER}.self_attn.o_proj.weight", f"{LAYER}.self_attn.o_proj.row_offsets",
     f"{LAYER}.mlp.other_proj.values", "model.other.weight"],
)  # fmt: skip
def test_tensor_that_has_no_place_is_refused(
    partly: Callable[[str], Path], tmp_path: Path, name: str, load: Callable[[Path], Any]
) -> None:
    more = tensors(lambda weights: weights.update({name: torch.ones(8)}))
    folder = damaged(partly("2:4"), tmp_path / "out", more)
    with pytest.raises((CheckpointError, ValueError, KeyError), match=r"other|o_proj"):
        load(folder)
