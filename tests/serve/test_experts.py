"""Mixtures of experts in the plugin: what vLLM's loader hands over, cuts, refusals, and engines."""

from __future__ import annotations

from itertools import product as product_of
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_families import save_family
from vllm_run import Question, ask, engine, farthest, is_same, skip_without
from weights import moved, weight_of

from gblm.errors import CheckpointError, InputError, UsageError
from gblm.export.dense import export_dense
from gblm.kernels import BACKENDS, experts
from gblm.model.folder import ModelFolder
from gblm.prune import prune
from gblm.recipe import Recipe
from gblm.serve.vllm_cli import check_packed
from gblm.sparse.formats import Format, from_spec
from gblm.sparse.formats.manifest import Group, Manifest
from gblm.sparse.weights import SparseWeight

pytestmark = pytest.mark.vllm
HIDDEN, INNER, COUNT = 128, 256, 4
SIDES = {"w1": (INNER, HIDDEN), "w3": (INNER, HIDDEN), "w2": (HIDDEN, INNER)}
ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
FORMATS = ("nm/2:4", "bitmask/0.5", "dense/dense")
SPECS = [f"{fmt}/{values}".removesuffix("/float")
         for fmt, values in product_of(FORMATS, ("float", "int8:64", "int4:row"))]  # fmt: skip
SPECS += ["dense/dense/int3:64"]
PREFIX = "model.layers.0.mlp.experts"
Weights = dict[tuple[int, str], SparseWeight]


def manifest(spec: str, all_packed: bool = False) -> Manifest:
    """All experts in one format; but gate of expert 1 is not packed, unless all are."""
    name, pattern, *values = spec.split("/")
    names = [f"{PREFIX}.{expert}.{role}" for expert in range(COUNT) for role in ROLES.values()]
    if not all_packed:
        names.remove(f"{PREFIX}.1.gate_proj")
    fields = {"format": name, "pattern": pattern, "targets": tuple(names)}
    return Manifest(groups=(Group(**fields, **({"values": values[0]} if values else {})),))


def make_layer(tp: tuple[int, int] = (0, 1), ep: tuple[int, int] = (0, 1), **more: object) -> Any:
    """What the plugin asks of vLLM's RoutedExperts, on one rank of several."""
    (rank, ranks), own = tp, range(COUNT * ep[0] // ep[1], COUNT * (ep[0] + 1) // ep[1])
    local = {expert: place for place, expert in enumerate(own)}
    layer: Any = torch.nn.Module()
    layer.moe_config = SimpleNamespace(
        tp_rank=rank, tp_size=ranks, has_bias=False, is_act_and_mul=True, device="cpu",
        is_lora_enabled=False,
        hidden_dim=HIDDEN, intermediate_size_per_partition=INNER // ranks,
    )  # fmt: skip
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    settings = {
        "params_dtype": torch.bfloat16, "global_num_experts": COUNT, "use_ep": ep[1] > 1,
        "activation": MoEActivation.SILU, "swiglu_limit": None,
        "apply_router_weight_on_input": False, "expert_map": None,
        "_map_global_expert_id_to_local_expert_id": lambda expert: local.get(expert, -1),
        **{f"ckpt_{role}_name": role for role in ROLES.values()},
    }  # fmt: skip
    if ep[1] > 1:
        settings["expert_map"] = torch.tensor([local.get(e, -1) for e in range(COUNT)]).int()
    for name, value in (settings | more).items():
        setattr(layer, name, value)
    return layer


def weights_of(fmt: Format) -> Weights:
    """Linears in a format, none like another: rows have moved."""
    return {
        (expert, side): moved(weight_of(fmt, shape), 16 * expert + 5 * place)
        for expert in range(COUNT)
        for place, (side, shape) in enumerate(SIDES.items())
    }


def load(
    layer: Any, fmt: Format, weights: Weights, *missing: str, all_packed: bool = False
) -> None:
    """Hand all parts over as vLLM's loader does; those that end so are missing."""
    for (expert, side), weight in weights.items():
        parts = fmt.pack("w", weight)
        if (expert, side) == (1, "w1") and not all_packed:
            parts = {"weight": weight.weight}
        for part, tensor in parts.items():
            name = f"{'w2' if side == 'w2' else 'w13'}_{part}"
            if f"{expert}.{side}.{part}".endswith(missing):
                continue
            param = getattr(layer, name)
            param.weight_loader(
                param=param, loaded_weight=tensor, weight_name=f"{PREFIX}.{name}", shard_id=side,
                expert_id=expert, return_success=True,
            )  # fmt: skip


def arriving(layer: Any, spec: str, all_packed: bool = False) -> Any:
    from gblm.serve.vllm_plugin.config import WideArriving

    return WideArriving(layer, PREFIX, manifest(spec, all_packed))


def grouped(layer: Any, spec: str, all_packed: bool = False) -> Any:
    from gblm.serve.vllm_plugin.experts import experts_method

    method = experts_method(layer, arriving(layer, spec, all_packed), lambda *choice: None)
    method.create_weights(layer)
    return method


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("spec", SPECS)
def test_each_linear_is_cut_to_its_rank(spec: str, rank: int) -> None:
    fmt, layer = from_spec(spec), make_layer(tp=(rank, 2))
    weights, found = weights_of(fmt), arriving(layer, spec)
    found.register(layer)
    load(layer, fmt, weights)
    parts = found.finish(layer)
    assert not [*layer.parameters()]
    for key, weight in weights.items():
        own = from_spec("dense/dense") if key == (1, "w1") else fmt.widened()
        dim = 1 if key[1] == "w2" else 0
        size = INNER // 2
        want = weight.weight.narrow(dim, rank * size, size)
        assert torch.equal(own.expand(parts[key]), want), key


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without("cpu")
    monkeypatch.setenv("GBLM_BACKEND", "cpu")


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    seed = torch.Generator().manual_seed(1)
    ids = torch.rand(tokens, COUNT, generator=seed).argsort(1)[:, :2].int()
    x = torch.randn(tokens, HIDDEN, generator=seed).bfloat16()
    return x, torch.rand(tokens, 2, generator=seed), ids


def call(method: Any, layer: Any, *inputs: torch.Tensor) -> torch.Tensor:
    method.process_weights_after_loading(layer)
    out: torch.Tensor = method.apply(layer, *inputs, None, None)
    return out


def formula(weights: Weights, x: torch.Tensor, shares: torch.Tensor, ids: torch.Tensor) -> Any:
    """The experts in float64."""
    linears = [
        tuple(lambda x, w=weights[expert, side].weight: x.double() @ w.double().t()
              for side in SIDES)
        for expert in range(COUNT)
    ]  # fmt: skip
    return experts.one_by_one(x.double(), ids, shares, linears)


def assert_near(got: torch.Tensor, want: torch.Tensor) -> None:
    """But for activations that the kernels round to int8."""
    assert (got.double() - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("spec", SPECS)
def test_tensor_parallel_ranks_add_up_to_the_whole(spec: str, on_cpu: None) -> None:
    fmt, inputs = from_spec(spec), routed(9)
    weights, total = weights_of(fmt), torch.zeros(9, HIDDEN).double()
    for rank in range(2):
        layer = make_layer(tp=(rank, 2))
        method = grouped(layer, spec)
        load(layer, fmt, weights)
        total += call(method, layer, *inputs).double()
    assert_near(total, formula(weights, *inputs))


def test_expert_parallel_ranks_add_up_to_the_whole(on_cpu: None) -> None:
    spec = "bitmask/0.5/int8:64"
    fmt, (x, shares, ids) = from_spec(spec), routed(9)
    weights, total = weights_of(fmt), torch.zeros(9, HIDDEN).double()
    for rank in range(2):
        layer = make_layer(ep=(rank, 2))
        method = grouped(layer, spec)
        assert len(method.arriving.linears) == 2 * len(SIDES)
        load(layer, fmt, weights)
        total += call(method, layer, x, shares, ids).double()
    assert_near(total, formula(weights, x, shares, ids))


def test_the_router_may_weigh_inputs(on_cpu: None) -> None:
    spec, fmt = "nm/2:4", from_spec("nm/2:4")
    x, shares, ids = routed(9)
    shares, ids = shares[:, :1], ids[:, :1]
    layer = make_layer(apply_router_weight_on_input=True)
    method, weights = grouped(layer, spec), weights_of(fmt)
    load(layer, fmt, weights)
    got = call(method, layer, x, shares, ids)
    assert_near(got, formula(weights, x * shares, torch.ones_like(shares), ids))


@pytest.mark.parametrize(
    ("missing", "named"),
    [("2.w3.bitmask", "2.up_proj"), ("1.w1.weight", "1.gate_proj"),
     ("3.w2.values", "3.down_proj"), ("0.w1.row_offsets", "0.gate_proj")],
)  # fmt: skip
def test_each_part_is_missed(missing: str, named: str, on_cpu: None) -> None:
    spec, fmt, layer = "bitmask/0.5", from_spec("bitmask/0.5"), make_layer()
    method = grouped(layer, spec)
    load(layer, fmt, weights_of(fmt), missing)
    with pytest.raises(CheckpointError, match=rf"^{PREFIX}\.{named}: parts of its weight are miss"):
        method.process_weights_after_loading(layer)


def test_what_is_damaged_or_has_no_place_is_refused(on_cpu: None) -> None:
    spec, fmt = "bitmask/0.5", from_spec("bitmask/0.5")
    weights = weights_of(fmt)
    weights[2, "w3"].weight[weights[2, "w3"].mask] = float("nan")
    layer = make_layer()
    grouped(layer, spec)
    with pytest.raises(CheckpointError, match=r"experts\.2\.up_proj\.values: holds NaN"):
        load(layer, fmt, weights)
    layer = make_layer()
    grouped(layer, spec)
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight: the manifest knows"):
        layer.w13_weight.weight_loader(layer.w13_weight, torch.ones(1), "w13_weight", "w1", 0)


def test_what_cannot_be_served_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for field, value in (("has_bias", True), ("is_act_and_mul", False)):
        layer = make_layer()
        setattr(layer.moe_config, field, value)
        with pytest.raises(CheckpointError, match="without biases, and with a gate, only"):
            arriving(layer, "nm/2:4")
    with pytest.raises(CheckpointError, match=r"0\.down_proj: 64 columns do.*work: 1, 2\."):
        grouped(make_layer(tp=(1, 4)), "nm/2:4/int8:128")
    layer = make_layer()
    layer.moe_config.is_lora_enabled = True
    with pytest.raises(UsageError, match="leave --enable-lora out"):
        grouped(layer, "nm/2:4")
    monkeypatch.setenv("GBLM_BACKEND", "dense")
    with pytest.raises(UsageError, match="leave --enable-expert-parallel out"):
        grouped(make_layer(ep=(1, 2)), "nm/2:4")


def test_only_plain_silu_is_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation

    from gblm.serve.vllm_plugin.experts import choose

    skip_without("cpu")
    for more in ({"activation": MoEActivation.GELU}, {"swiglu_limit": 7.0}):
        layer = make_layer(**more)
        backend, reasons = choose(layer, arriving(layer, "nm/2:4"))
        assert backend.name == "dense"
        assert reasons == ["experts: the grouped call knows plain silu alone"]
    layer = make_layer()
    monkeypatch.setenv("GBLM_BACKEND", "reference")
    assert choose(layer, arriving(layer, "nm/2:4"))[1] == [
        "reference: it has no grouped call for experts"
    ]


CUDA = "cpu: it runs on CPU, not on cuda"
DENSE, MIXED = (
    "triton: a dense weight has no zeros to leave out",
    "triton: experts of a layer are stored in different formats",
)


@pytest.mark.parametrize(
    ("spec", "forced", "name", "reasons"),
    [
        ("nm/2:4", None, "triton", [CUDA]),
        ("bitmask/0.5/int4:row", None, "triton", [CUDA]),
        ("nm/2:4", "triton", "triton", []),
        ("nm/2:4", "mma_sp", "dense", ["mma_sp: it has no grouped call for experts"]),
        ("nm/2:4", "dense", "dense", []),
        ("dense/dense/int8:row", None, "dense", [CUDA, DENSE]),
    ],
)
def test_experts_on_a_gpu_are_packed_or_expanded(
    monkeypatch: pytest.MonkeyPatch, spec: str, forced: str | None, name: str, reasons: list[str]
) -> None:
    from gblm.kernels.triton import backend
    from gblm.serve.vllm_plugin.experts import choose

    monkeypatch.setattr(backend, "refusal", lambda device: None)
    monkeypatch.setattr(BACKENDS["mma_sp"], "refuses_device", lambda device: None)
    monkeypatch.delenv("GBLM_BACKEND", raising=False)
    if forced:
        monkeypatch.setenv("GBLM_BACKEND", forced)
    layer = make_layer()
    layer.moe_config.device = "cuda"
    chosen, why = choose(layer, arriving(layer, spec, all_packed=True))
    assert (chosen.name, why) == (name, reasons)


def test_what_stacks_of_experts_are_not_made_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from gblm.kernels.triton import backend
    from gblm.serve.vllm_plugin.experts import choose

    monkeypatch.delenv("GBLM_BACKEND", raising=False)
    monkeypatch.setattr(backend, "refusal", lambda device: None)
    layer = make_layer()
    layer.moe_config.device = "cuda"
    assert choose(layer, arriving(layer, "nm/2:4"))[1] == [CUDA, DENSE]
    found = arriving(layer, "nm/2:4", all_packed=True)
    found.linears[1, "w3"] = found.linears[1, "w3"]._replace(fmt=from_spec("nm/2:4/int8:row"))
    assert choose(layer, found)[1] == [CUDA, MIXED]
    # A bitmask holds any pattern.
    found = arriving(layer, "bitmask/0.5", all_packed=True)
    found.linears[1, "w3"] = found.linears[1, "w3"]._replace(fmt=from_spec("bitmask/0.7"))
    assert choose(layer, found)[0].name == "triton"
    monkeypatch.setattr(backend, "refusal", lambda device: "there is no Triton")
    assert choose(layer, found)[1] == [CUDA, "triton: there is no Triton"]
    monkeypatch.setenv("GBLM_BACKEND", "triton")
    with pytest.raises(UsageError, match=r"no backend can serve.*triton: there is no Triton"):
        choose(layer, found)


class Unpacked:
    """Stands for the backend `triton`, whose kernels tests/triton_check.py proves."""

    def prepare(self, fmt: Format, parts: Any, shape: Any, dtype: Any) -> list[torch.Tensor]:
        return [fmt.expand(parts, dtype), *torch.empty(4, 0)]

    def multiply(
        self, x: torch.Tensor, out: torch.Tensor, prepared: Any, fmt: Any, shape: Any, pairs: Any
    ) -> None:
        dense, chosen = prepared[0].reshape(-1, *shape), len(out) // len(x)
        out.fill_(torch.nan)
        for expert, first, count in pairs.groups.tolist():
            for pair in pairs.order[first : first + count].tolist():
                out[pair] = dense[expert] @ x[pair // chosen]


@pytest.mark.parametrize("more", [{}, {"apply_router_weight_on_input": True}])
@pytest.mark.parametrize("ranks", ["tp", "ep"])
@pytest.mark.parametrize("spec", ["nm/2:4/int8:64", "bitmask/0.5"])
def test_stacks_on_all_ranks_add_up_to_the_whole(
    monkeypatch: pytest.MonkeyPatch, spec: str, ranks: str, more: dict[str, Any]
) -> None:
    from gblm.kernels.triton import backend
    from gblm.serve.vllm_plugin import experts as module

    monkeypatch.setattr(backend, "refusal", lambda device: None)
    monkeypatch.setattr(module, "Triton", Unpacked)
    monkeypatch.setenv("GBLM_BACKEND", "triton")
    fmt, (x, shares, ids) = from_spec(spec), routed(9)
    if more:
        shares, ids = shares[:, :1], ids[:, :1]
    weights, total = weights_of(fmt), torch.zeros(9, HIDDEN).double()
    for rank in range(2):
        layer = make_layer(**{ranks: (rank, 2)}, **more)
        method = grouped(layer, spec, all_packed=True)
        load(layer, fmt, weights, all_packed=True)
        total += call(method, layer, x, shares, ids).double()
    if more:
        x, shares = x * shares, torch.ones_like(shares)
    assert_near(total, formula(weights, x, shares, ids))


@pytest.mark.parametrize("padded", [0, 32])
@pytest.mark.parametrize("spec", ["nm/2:4/int4:row", "bitmask/0.5"])
def test_expanded_experts_lie_where_vllm_reads_them(
    monkeypatch: pytest.MonkeyPatch, spec: str, padded: int
) -> None:
    from gblm.serve.vllm_plugin.experts import ExpandedExperts

    fmt, layer, inner = from_spec(spec), make_layer(), INNER + padded
    weights, noted, handed = weights_of(fmt), [], []

    def create_weights(self: Any, layer: torch.nn.Module, **sizes: Any) -> None:
        for name, shape in (("w13", (2 * inner, HIDDEN)), ("w2", (HIDDEN, inner))):
            full = torch.full((COUNT, *shape), torch.nan, dtype=torch.bfloat16)
            layer.register_parameter(f"{name}_weight", torch.nn.Parameter(full))

    own = ExpandedExperts.__base__
    monkeypatch.setattr(own, "__init__", lambda self, moe: torch.nn.Module.__init__(self))
    monkeypatch.setattr(own, "create_weights", create_weights)
    monkeypatch.setattr(own, "process_weights_after_loading", lambda self, it: handed.append(it))
    method = ExpandedExperts(layer.moe_config, arriving(layer, spec), lambda: noted.append(1))
    method.create_weights(layer)
    load(layer, fmt, weights)
    method.process_weights_after_loading(layer)
    assert (handed, len(noted)) == ([layer], COUNT * len(SIDES))
    for (expert, side), weight in weights.items():
        merged = (layer.w2_weight if side == "w2" else layer.w13_weight)[expert]
        rows, columns = SIDES[side]
        start = inner if side == "w3" else 0
        assert torch.equal(merged[start : start + rows, :columns], weight.weight)
        merged.data[start : start + rows, :columns] = 0
    assert not layer.w13_weight.any()
    assert not layer.w2_weight.any()


def test_llama_4_is_served_without_packed_q_and_k() -> None:
    """vLLM puts their rows in another order, by the name of a dense weight."""
    for role in ("q_proj", "k_proj", "v_proj"):
        group = Group(format="nm", pattern="2:4", targets=(f"model.layers.*.self_attn.{role}",))
        found = Manifest(groups=(group,))
        check_packed({"model_type": "llama"}, found)
        if role == "v_proj":
            check_packed({"model_type": "llama4_text"}, found)
            continue
        for config in (
            {"model_type": "llama4_text"},
            {"text_config": {"model_type": "llama4_text"}},
        ):
            with pytest.raises(InputError, match="vLLM reorders the rows of Llama 4's q_proj"):
                check_packed(config, found)


# Traced by torch.compile, but not turned into code, which would take 20 seconds each time.
TRACED: dict[str, Any] = {
    "enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}
}  # fmt: skip


def test_a_packed_mixture_answers_as_its_dense_self(mixture: Path, best_backend: str) -> None:
    ask(answers(mixture, best_backend))


def answers(made: Path, backend: str) -> Question:
    ours = made / "packed"
    want, expanded, eager, traced = yield [
        engine(made / "dense"), engine(ours, "dense"), engine(ours, backend),
        engine(ours, backend, **TRACED),
    ]  # fmt: skip
    assert is_same(expanded, want)
    assert "44 linears run on backend dense (expanded at load)" in expanded.log
    if backend == "cpu":
        assert "44 linears run on backend cpu (packed in memory)" in eager.log
    assert max(farthest(eager, want), farthest(traced, want)) < 0.3


# Beside Mixtral.
ROUTED = ("olmoe", "qwen2 moe", "qwen3 moe", "granite moe (fused)", "llama 4 text (fused)")


def test_families_whose_tokens_choose_answer_as_their_dense_selves(
    tmp_path: Path, best_backend: str
) -> None:
    ask(*(chosen(tmp_path / str(n), name, best_backend) for n, name in enumerate(ROUTED)))


def chosen(root: Path, family: str, backend: str) -> Question:
    """A token has two of four experts, of Llama 4 one, as vLLM has it.

    All before the router is dense: a rounding there would move tokens to other experts.
    """
    per_token = 1 if "llama" in family else 2
    save_family(
        family, root / "model", hidden_size=128, head_dim=32, num_hidden_layers=1,
        num_experts_per_tok=per_token,
    )  # fmt: skip
    recipe = Recipe(
        model=str(root / "model"), method="magnitude", pattern="2:4", calibration=None,
        ignore=("*.self_attn.*",),
    )  # fmt: skip
    prune(recipe, root / "packed")
    export_dense(ModelFolder.open(root / "packed"), root / "dense")
    folders = ((root / "dense", None), (root / "packed", "dense"), (root / "packed", backend))
    want, expanded, packed = yield [engine(*folder) for folder in folders]
    assert is_same(expanded, want)
    if backend == "cpu":
        assert "linears run on backend cpu (packed in memory)" in packed.log
        assert "on backend dense" not in packed.log
    assert farthest(packed, want) < 0.1
