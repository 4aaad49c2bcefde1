"""The output head in vLLM without an engine: cut over ranks, padded, freed, refused.

In engines: test_vllm_plugin.py.
"""

from __future__ import annotations

import pytest
import torch
from vllm_run import skip_without
from weights import weight_of

from gblm.errors import CheckpointError, MachineError
from gblm.sparse.formats import Format, from_spec
from gblm.sparse.formats.manifest import Group, Manifest
from gblm.sparse.weights import SparseWeight

pytestmark = pytest.mark.vllm
VOCABULARY, HIDDEN, PADDED = 258, 64, 320


def codes_for(spec: str) -> tuple[Format, SparseWeight]:
    fmt = from_spec(spec)
    return fmt, weight_of(fmt, (VOCABULARY, HIDDEN))


def be_rank(patch: pytest.MonkeyPatch, rank: int = 0, num_ranks: int = 1) -> None:
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import vocab_parallel_embedding

    for module in (parameter, vocab_parallel_embedding):
        patch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        patch.setattr(module, "get_tensor_model_parallel_world_size", lambda: num_ranks)


def create(
    fmt: Format | None, monkeypatch: pytest.MonkeyPatch, rank: int = 0, num_ranks: int = 1
) -> torch.nn.Module:
    """vLLM's own head of one rank, empty."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    from gblm.serve.vllm_plugin.config import SparseConfig

    be_rank(monkeypatch, rank, num_ranks)
    groups = [Group(format="nm", pattern="2:4", targets=("x",))]
    if fmt is not None:
        values = str(fmt.values)
        groups.append(Group(format=fmt.name, pattern=str(fmt.pattern), values=values,
                            targets=("lm_head",)))  # fmt: skip
    config = SparseConfig(Manifest(groups=tuple(groups)))
    with set_current_vllm_config(VllmConfig()):
        return ParallelLMHead(
            VOCABULARY, HIDDEN, params_dtype=torch.bfloat16, quant_config=config, prefix="lm_head"
        )


def load(head: torch.nn.Module, parts: dict[str, torch.Tensor]) -> None:
    for part, tensor in parts.items():
        parameter = head.get_parameter(part)
        parameter.weight_loader(parameter, tensor)


SPECS = ("dense/dense/int8:64", "dense/dense/int4:row", "dense/dense")


def product(head: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Some hidden states, and the logits that the head makes of them."""
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    return x, head.quant_method.apply(head, x)


@pytest.mark.parametrize(
    ("backend", "rank", "num_ranks"), [("reference", 0, 1), ("dense", 0, 2), ("cpu", 1, 2)]
)
@pytest.mark.parametrize("spec", SPECS)
def test_rows_are_cut_and_padded(
    spec: str, backend: str, rank: int, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without(backend)
    monkeypatch.setenv("GBLM_BACKEND", backend)
    fmt, weight = codes_for(spec)
    head = create(fmt, monkeypatch, rank, num_ranks)
    load(head, fmt.pack("lm_head", weight))
    head.quant_method.process_weights_after_loading(head)
    x, got = product(head)
    rows = PADDED // num_ranks
    own = weight.weight[rank * rows : (rank + 1) * rows]
    assert got.shape == (3, rows)
    torch.testing.assert_close(got[:, : len(own)], x @ own.T, rtol=0.02, atol=0.3)
    assert not got[:, len(own) :].any()


@pytest.mark.parametrize(
    ("spec", "part"), [(spec, part) for spec in SPECS for part in from_spec(spec).parts]
)
def test_part_that_was_never_loaded_is_refused(
    spec: str, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, weight = codes_for(spec)
    head = create(fmt, monkeypatch)
    parts = fmt.pack("lm_head", weight)
    del parts[part]
    load(head, parts)
    with pytest.raises(CheckpointError, match=r"lm_head.*(are missing|is nan|or NaN)"):
        head.quant_method.process_weights_after_loading(head)


def test_other_formats_than_dense_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="lm_head: vLLM serves an output head in the format"):
        create(from_spec("nm/2:4"), monkeypatch)


@pytest.mark.parametrize("tied", [True, False])
def test_panels_replace_a_weight_that_nothing_else_needs(
    tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without("cpu")
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    head = create(None, monkeypatch)
    _, weight = codes_for("dense/dense")
    owner = head
    if tied:
        owner = VocabParallelEmbedding(VOCABULARY, HIDDEN, params_dtype=torch.bfloat16)
        head.tie_weights(owner)
    load(owner, {"weight": weight.weight})
    head.quant_method.process_weights_after_loading(head)
    assert owner.weight.numel() == (PADDED * HIDDEN if tied else 0)
    x, got = product(head)
    torch.testing.assert_close(got[:, :VOCABULARY], x @ weight.weight.T, rtol=0.02, atol=0.05)
    if tied:
        ids = torch.arange(5)
        assert torch.equal(owner.quant_method.embedding(owner, ids), weight.weight[:5])


@pytest.mark.parametrize(
    ("values", "rank", "num_ranks"), [("int8:64", 0, 1), ("int8:64", 1, 2), ("int4:32", 0, 1)]
)
def test_embeddings_are_rows_of_a_head_that_is_tied_to_them(
    values: str, rank: int, num_ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fmt, weight = codes_for(f"dense/dense/{values}")
    embeddings, head = create_tied(fmt, monkeypatch, rank, num_ranks)
    load(head, fmt.pack("lm_head", weight))
    for layer in (embeddings, head):
        layer.quant_method.process_weights_after_loading(layer)
    own = weight.weight[rank * PADDED // num_ranks :][: PADDED // num_ranks]
    ids = torch.tensor([[3, 0], [len(own) - 1, 7]])
    found = embeddings.quant_method.embedding(embeddings, ids)
    assert torch.equal(found, own[ids].bfloat16())
    x, got = product(head)
    torch.testing.assert_close(got[:, : len(own)], x @ own.bfloat16().T, rtol=0.02, atol=0.3)


def create_tied(
    fmt: Format, monkeypatch: pytest.MonkeyPatch, rank: int = 0, num_ranks: int = 1, stages: int = 1
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """vLLM's own embeddings and head of one rank, empty; the manifest ties them."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    from gblm.serve.vllm_plugin.config import SparseConfig

    be_rank(monkeypatch, rank, num_ranks)
    group = Group(format="dense", pattern="dense", values=str(fmt.values), targets=("lm_head",))
    config = SparseConfig(Manifest(groups=(group,), tied={"model.embed_tokens": "lm_head"}))
    how = {"params_dtype": torch.bfloat16, "quant_config": config}
    current = VllmConfig()
    current.parallel_config.pipeline_parallel_size = stages
    with set_current_vllm_config(current):
        embeddings = VocabParallelEmbedding(VOCABULARY, HIDDEN, **how)
        return embeddings, ParallelLMHead(VOCABULARY, HIDDEN, prefix="lm_head", **how)


def test_stages_cannot_part_embeddings_from_their_head(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MachineError, match="which pipeline stages would part"):
        create_tied(from_spec("dense/dense/int8:64"), monkeypatch, stages=2)


def test_embeddings_are_copied_only_to_multiply_with_them() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    from gblm.serve.vllm_plugin.config import SparseConfig

    config = SparseConfig(Manifest(groups=(Group(format="nm", pattern="2:4", targets=("x",)),)))
    _, weight = codes_for("dense/dense")
    with set_current_vllm_config(VllmConfig()), pytest.MonkeyPatch.context() as patch:
        be_rank(patch)
        embeddings = VocabParallelEmbedding(
            VOCABULARY, HIDDEN, params_dtype=torch.bfloat16, quant_config=config, prefix="e"
        )
    load(embeddings, {"weight": weight.weight})
    embeddings.quant_method.process_weights_after_loading(embeddings)
    assert not hasattr(embeddings, "cpu_linear")
    x, got = product(embeddings)
    torch.testing.assert_close(got[:, :VOCABULARY], x @ weight.weight.T, rtol=0.02, atol=0.05)
    ids = torch.arange(5)
    assert torch.equal(embeddings.quant_method.embedding(embeddings, ids), weight.weight[:5])
