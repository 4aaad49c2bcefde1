"""Mixtures of experts: linears one by one in memory and on disk, whatever is fused elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from alike import IDS, assert_same_tensors, exported, logits
from conftest import Once, save_byte_tokenizer
from damage import config, damaged, tensors
from safetensors.torch import load_file
from test_families import EXPERTS, NUM_EXPERTS, save_family
from transformers import AutoConfig, AutoModelForCausalLM
from weights import stored

from gblm import packed
from gblm.calibrate.experts import MIN_TOKENS
from gblm.calibrate.gradients import gradient_norms
from gblm.calibrate.stats import STATS
from gblm.calibrate.walk import Walk, walk
from gblm.checkpoint.inspect import inspect, verify
from gblm.errors import CheckpointError, PatternError
from gblm.evaluate.perplexity import Protocol
from gblm.evaluate.run import Evaluation, run_evaluation
from gblm.export.dense import export_dense
from gblm.export.pack import export_pack
from gblm.kernels import native
from gblm.model import experts
from gblm.model.experts import MOST_EXPERTS
from gblm.model.folder import ModelFolder
from gblm.model.layers import stream
from gblm.model.loading import auto_class, load
from gblm.prune import prune
from gblm.prune.job import open_job
from gblm.recipe import Calibration, Recipe, Recovering
from gblm.recover.run import recover
from gblm.search.candidates import answer, parse_budget
from gblm.search.examine import Space, examine

NAMES = {"mixtral": "block_sparse_moe.experts.3.w2", "olmoe": "mlp.experts.3.down_proj"}


@pytest.fixture(scope="session")
def make(once: Once) -> Callable[[str], Path]:
    """Makes the dense model of a family, once."""
    return lambda family: once(f"experts-{family[:8].replace(' ', '-')}", partial(_save, family))


def _save(family: str, folder: Path) -> None:
    save_family(family, folder)


@pytest.mark.parametrize("family", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_by_one_they_compute_what_the_fused_ones_do(
    make: Callable[[str], Path], threads: None, family: str, dtype: torch.dtype
) -> None:
    # Two threads share a float32 product by its shape, and with that the order of its sums.
    torch.set_num_threads(1)
    model = load(make(family), dtype)
    want = logits(model)
    experts.unfuse(model)
    assert [len(block) for _, block in experts.blocks(model)] == [4, 4]
    # Llama 4's fused ones are a batch, whose sums MKL orders otherwise in float32.
    if (family, dtype) == ("llama 4 text (fused)", torch.float32):
        torch.testing.assert_close(logits(model), want)
    else:
        assert torch.equal(logits(model), want)


@pytest.mark.parametrize("family", EXPERTS)
def test_a_file_holds_them_fused_or_not(make: Callable[[str], Path], family: str) -> None:
    folder = make(family)
    model = load(folder)
    experts.unfuse(model)
    want = model.state_dict()
    with stream(ModelFolder.open(folder)) as layers:
        read = {name: layers.reader.tensor(name) for name in layers.reader}
    assert want.keys() - {"lm_head.weight"} <= read.keys() <= want.keys()
    assert all(torch.equal(read[name], want[name]) for name in read)


WAYS = [(pattern, values) for pattern in ("2:4", "0.5") for values in ("float", "int8", "int4")]


@pytest.mark.parametrize(("pattern", "values"), WAYS)
@pytest.mark.parametrize("family", EXPERTS)
def test_packed_they_equal_the_dense_export(
    make: Callable[[str], Path], family: str, pattern: str, values: str, text_file: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """In transformers' own classes, which load the export as any other folder."""
    text = Calibration(source=str(text_file), num_samples=8, seq_len=32)
    recipe = Recipe(
        model=str(make(family)), method="wanda", pattern=pattern, values=values, calibration=text
    )
    ours, dense = tmp_path / "ours", tmp_path / "dense"
    report = prune(recipe, ours)
    assert report["sparsity"] == pytest.approx(0.5, abs=0.01)
    if family in NAMES:
        assert f"model.layers.1.{NAMES[family]}" in {row["name"] for row in report["tensors"]}
    export_dense(ModelFolder.open(ours), dense)
    verify(ModelFolder.open(ours), ModelFolder.open(dense))
    plain = AutoModelForCausalLM.from_pretrained(
        dense, dtype="auto", experts_implementation="eager"
    ).eval()
    want = logits(plain)
    assert torch.equal(logits(packed.load(ours, "dense")), want)
    assert torch.equal(logits(load(dense)), want)
    kernel = logits(packed.load(ours, "reference" if native.refusal() else "cpu"))
    # cpu rounds activations to int8 where it meets codes; a token on the edge may change experts.
    assert (kernel - want).norm() < 0.2 * want.norm()


# Other families, each once: model_type and what differs from the common fields.
MLA = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16,
       "v_head_dim": 16, "num_key_value_heads": 4}  # fmt: skip
GROUPS = {"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
VISION = {
    "hidden_size": 32, "depth": 2, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
}  # fmt: skip
MORE: dict[str, dict[str, Any]] = {
    "deepseek_v2": MLA | {"first_k_dense_replace": 1}, "deepseek_v3": MLA | GROUPS,
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    "glm4_moe": GROUPS, "granitemoeshared": {"shared_intermediate_size": 64},
    "hunyuan_v1_moe": {}, "minimax_m2": {}, "phimoe": {}, "qwen3_vl_moe": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", MORE)
def test_other_families_go_the_same_road(kind: str, text_file: Path, tmp_path: Path) -> None:
    fields = {
        "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96, "head_dim": 16,
        "intermediate_size_mlp": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 272, "max_position_embeddings": 512,
        "initializer_range": 0.1, "n_routed_experts": 4, "pad_token_id": 0, "bos_token_id": 256,
        "eos_token_id": 257, **NUM_EXPERTS, **MORE[kind],
    }  # fmt: skip
    if kind == "qwen3_vl_moe":
        text = fields | {"model_type": f"{kind}_text"}
        fields = {"text_config": text, "vision_config": VISION}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **fields)
    model = auto_class(config).from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or not parameter.any():
                parameter.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "model")
    save_byte_tokenizer(tmp_path / "model")
    recipe = Recipe(
        model=str(tmp_path / "model"), method="gblm", values="int8",
        calibration=Calibration(source=str(text_file), num_samples=8, seq_len=32),
    )  # fmt: skip
    report = prune(recipe, tmp_path / "ours")
    names = {row["name"] for row in report["tensors"]}
    assert sum(".experts.3." in name for name in names) in (3, 6)
    assert not any(re.search(r"\.gate\.|gate$|router", name) for name in names)
    export_dense(ModelFolder.open(tmp_path / "ours"), tmp_path / "dense")
    verify(ModelFolder.open(tmp_path / "ours"), ModelFolder.open(tmp_path / "dense"))
    want = logits(load(tmp_path / "dense"))
    assert torch.equal(logits(packed.load(tmp_path / "ours", "dense")), want)


# What a token reaches.

# Which of equal scores counts, and the others.
CHOSEN = int(torch.full((1, 4), 0.25).topk(1).indices)
OTHERS = [expert for expert in range(4) if expert != CHOSEN]


def one_expert(folder: Path, layers: int = 2) -> tuple[Path, Path]:
    """A Mixtral whose router sends all tokens to one expert, and a Mistral with that as its MLP."""
    fields = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": layers, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 258,
        "max_position_embeddings": 512, "initializer_range": 0.1, "sliding_window": None,
        "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    }  # fmt: skip
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "mixtral", **fields, num_local_experts=4, num_experts_per_tok=1
    )  # fmt: skip
    mixture = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if name.endswith("gate.weight"):
                parameter.zero_()
    mixture.save_pretrained(folder / "mixture")
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **fields))
    tensors = load_file(folder / "mixture/model.safetensors")
    roles = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
    named = {name: tensor for name, tensor in tensors.items() if "block_sparse_moe" not in name}
    for layer, (old, new) in product(range(layers), roles.items()):
        prefix = f"model.layers.{layer}"
        named[f"{prefix}.mlp.{new}.weight"] = tensors[
            f"{prefix}.block_sparse_moe.experts.{CHOSEN}.{old}.weight"
        ]
    dense.load_state_dict(named)
    dense.to(torch.bfloat16).save_pretrained(folder / "dense")
    for made in ("mixture", "dense"):
        save_byte_tokenizer(folder / made)
    return folder / "mixture", folder / "dense"


@pytest.mark.parametrize(
    ("method", "more"),
    [("wanda", {}), ("gblm", {}), ("gblm", {"values": "int8"}), ("sparsegpt", {}),
     ("sparsegpt", {"values": "int4", "rounding": "obs", "pattern": "0.5"}),
     ("wanda", {"values": "int4", "refit": {}}), ("alps", {}),
     ("wanda", {"values": "int8", "reconstruct": {"epochs": 1}})],
)  # fmt: skip
@pytest.mark.parametrize("order", ["layer", "sequential"])
def test_with_all_tokens_an_expert_is_pruned_as_the_mlp_that_it_is(
    order: str, method: str, more: dict[str, Any], text_file: Path, tmp_path: Path
) -> None:
    text = Calibration(source=str(text_file), num_samples=4, seq_len=32, order=order)
    made = []
    for folder in one_expert(tmp_path):
        recipe = Recipe.from_dict(
            {"model": str(folder), "method": method, "calibration": text.model_dump(), **more}
        )
        prune(recipe, tmp_path / f"{folder.name}-out")
        made.append(load_file(tmp_path / f"{folder.name}-out/model.safetensors"))
    mixture, dense = made
    roles = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    for name, tensor in dense.items():
        parts = name.split(".")
        if "mlp" in parts:
            parts[3:5] = ["block_sparse_moe", "experts", str(CHOSEN), roles[parts[4]]]
        assert torch.equal(mixture[".".join(parts)], tensor), name
    before = load_file(tmp_path / "mixture/model.safetensors")
    routers = [name for name in before if name.endswith("gate.weight")]
    assert routers
    for name in routers:
        assert torch.equal(mixture[name], before[name]), name


def samples(text_file: Path, folder: Path, count: int) -> list[torch.Tensor]:
    text = Recipe(
        model=str(folder), method="wanda",
        calibration=Calibration(source=str(text_file), num_samples=count, seq_len=32),
    )  # fmt: skip
    with open_job(text) as job:
        return job.batches()


def test_experts_that_no_token_reaches_take_the_mean_of_all_and_are_named(
    text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = one_expert(tmp_path)
    batches, block = samples(text_file, folder, 4), "block_sparse_moe.experts"
    with caplog.at_level("INFO"), stream(ModelFolder.open(folder)) as layers:
        for layer in walk(layers, batches, Walk(frozenset(STATS))):
            found = layer.observe()
            for role, expert in product(("w1", "w2", "w3"), OTHERS):
                own, all_of_it = (
                    found[f"{block}.{expert}.{role}"],
                    found[f"{block}.{CHOSEN}.{role}"],
                )
                torch.testing.assert_close(own["act_norm"], all_of_it["act_norm"] / 2)
                torch.testing.assert_close(own["hessian"], all_of_it["hessian"] / 4)
        rows = [batch[0] for batch in batches]
        names = [f"{layers.name(0)}.{block}.{expert}.w2" for expert in range(4)]
        *_, (_, norms) = gradient_norms(layers, rows, names, "l2")
        own = norms[names[CHOSEN]]
        assert own.count_nonzero() > 1000
        assert all(torch.equal(norms[names[other]], own / 2) for other in OTHERS)
    said = f"experts {', '.join(map(str, OTHERS))} saw fewer than 64 tokens of the text and take"
    for layer, what in ((0, "statistics"), (1, "statistics"), (0, "gradients"), (1, "gradients")):
        line = f"model.layers.{layer}.{block}: {said} the mean {what} of all"
        assert (line in caplog.messages) == (layer == 0 or what == "statistics")


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "llama 4 text (fused)"])
def test_statistics_are_those_of_an_experts_tokens_as_the_router_weighs_them(
    make: Callable[[str], Path], family: str, text_file: Path
) -> None:
    """The oracle: what enters transformers' fused module, and its weights."""
    folder = make(family)
    batches = samples(text_file, folder, 16)
    seen: list[tuple[torch.Tensor, ...]] = []
    model = load(folder)
    fused = next(m for m in model.modules() if hasattr(m, "gate_up_proj"))
    fused.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    with stream(ModelFolder.open(folder)) as layers:
        steps = walk(layers, batches, Walk(frozenset({"act_norm"})))
        found = next(steps).observe()
    block = next(name for name in found if name.endswith("experts.0.up_proj") or ".0.w3" in name)
    for expert in range(4):
        tokens, inner = expert_inputs(fused, seen, expert)
        roles = ("w1", "w2") if family == "mixtral" else ("gate_proj", "down_proj")
        for role, inputs in zip(roles, (tokens, inner), strict=True):
            want = (inputs.float().square().sum(0) / len(batches)).sqrt()
            name = f"{block.rpartition('.0.')[0]}.{expert}.{role}"
            torch.testing.assert_close(found[name]["act_norm"], want, rtol=1e-2, atol=1e-3)


def expert_inputs(
    fused: Any, seen: list[tuple[torch.Tensor, ...]], expert: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What enters gate and up, and down, of an expert, each token times its weight."""
    rows = []
    for hidden, *routing in seen:
        if not routing:
            rows.append((hidden.chunk(4)[expert], torch.ones(1)))
            continue
        token, place = torch.where(routing[0] == expert)
        rows.append((hidden[token], routing[1][token, place, None].float()))
    weight = fused.gate_up_proj[expert].detach()
    weight = weight if fused.gate_up_proj.shape[2] == 64 else weight.t()
    inner = []
    for hidden, by in rows:
        gate, up = torch.nn.functional.linear(hidden, weight).chunk(2, dim=-1)
        inner.append(fused.act_fn(gate) * up * by)
    return torch.cat([hidden * by for hidden, by in rows]), torch.cat(inner)


# The whole road.


def test_names_choose_single_experts(make: Callable[[str], Path], tmp_path: Path) -> None:
    recipe = Recipe.from_dict({
        "model": str(make("qwen2 moe")), "method": "magnitude", "calibration": None,
        "ignore": ["*.experts.*.down_proj", "shared_expert.*"],
        "layers": [
            {"targets": ["layers.1.mlp.experts.3.*_proj"], "pattern": "0.75", "values": "int4"},
            {"targets": ["experts.0.*_proj"], "values": "int8"},
        ],
    })  # fmt: skip
    report = prune(recipe, tmp_path / "out")
    ways = {row["name"]: (row["pattern"], row.get("values")) for row in report["tensors"]}
    assert not any("down" in name or "shared" in name for name in ways)
    assert len(ways) == 2 * (4 + 2 * 4)
    assert ways["model.layers.1.mlp.experts.3.up_proj"] == ("0.75", "int4:64")
    assert ways["model.layers.1.mlp.experts.0.gate_proj"] == ("2:4", "int8:64")
    assert ways["model.layers.0.mlp.experts.3.up_proj"] == ("2:4", None)
    exported(tmp_path / "out", tmp_path / "dense", ("dense",))


def test_all_experts_of_a_family_are_one_line(make: Callable[[str], Path], tmp_path: Path) -> None:
    for family in ("olmoe", "mixtral"):
        out = tmp_path / family
        prune(Recipe(model=str(make(family)), method="magnitude", calibration=None), out)
        facts = inspect(ModelFolder.open(out))
        assert [(group["pattern"], group["linears"]) for group in facts["groups"]] == [("2:4", 32)]
        (group,) = json.loads((out / "config.json").read_text())["quantization_config"]["groups"]
        assert len(group["targets"]) == 7


@pytest.mark.parametrize("family", ["mixtral", "granite moe (fused)", "llama 4 text (fused)"])
def test_a_dense_folder_with_zeros_is_packed_to_the_same_bytes(
    make: Callable[[str], Path], family: str, tmp_path: Path
) -> None:
    """The export, fused or not as the family's files are, back again."""
    prune(Recipe(model=str(make(family)), method="magnitude", calibration=None), tmp_path / "a")
    export_dense(ModelFolder.open(tmp_path / "a"), tmp_path / "dense")
    source = load_file(make(family) / "model.safetensors")
    assert load_file(tmp_path / "dense/model.safetensors").keys() == source.keys()
    export_pack(tmp_path / "dense", tmp_path / "b")
    assert_same_tensors(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2 moe", "granite moe (fused)", "llama 4 text (fused)"]
)
def test_they_are_evaluated_and_recovered(
    make: Callable[[str], Path], family: str, text_file: Path, tmp_path: Path
) -> None:
    text, ours, dense = str(text_file), tmp_path / "ours", tmp_path / "dense"
    recipe = Recipe(
        model=str(make(family)), method="magnitude", calibration=None, values="int8", head="int8"
    )
    prune(recipe, ours)
    export_dense(ModelFolder.open(ours), dense)
    asked = Evaluation(str(ours), (Protocol(text, 32, 2),), baseline=str(dense), backend="dense")
    ppl = {row.side: row.value for row in run_evaluation(asked).rows if row.metric == "perplexity"}
    assert ppl["ours"] == ppl["dense"] > 1
    how = Recovering(text=text, held_out=(text,), tokens=1024, seq_len=32, learning_rate=0.02)
    assert recover(ours, tmp_path / "recovered", how)["kept"]
    verify(ModelFolder.open(tmp_path / "recovered"))
    for name, (_, weight) in stored(tmp_path / "recovered").items():
        assert torch.equal(weight.mask, stored_masks(ours)[name])
    packed.load(tmp_path / "recovered")


@cache
def stored_masks(folder: Path) -> dict[str, torch.Tensor]:
    return {name: weight.mask for name, (_, weight) in stored(folder).items()}


def test_all_experts_have_gradients_where_ranks_wait_for_each_other(tmp_path: Path) -> None:
    model = load(one_expert(tmp_path)[0])
    experts.unfuse(model, every=True)
    model(IDS).logits.sum().backward()
    for _, block in experts.blocks(model):
        zero = [all(not p.grad.any() for p in expert.parameters()) for expert in block]
        assert zero == [expert != CHOSEN for expert in range(4)]


def test_an_expert_is_as_sensitive_as_the_mlp_that_it_is(text_file: Path, tmp_path: Path) -> None:
    text = Calibration(source=str(text_file), num_samples=4, seq_len=32)
    mixture, dense = (
        examine(Recipe(model=str(folder), method="sparsegpt", calibration=text), Space()).curves
        for folder in one_expert(tmp_path)
    )
    for layer, (old, new) in product(range(2), (("w1", "gate_proj"), ("w2", "down_proj"))):
        prefix = f"model.layers.{layer}"
        curve = mixture[f"{prefix}.block_sparse_moe.experts.{CHOSEN}.{old}"]
        want = dense[f"{prefix}.mlp.{new}"]
        assert curve.fixed == pytest.approx(want.fixed, rel=1e-4)
        assert curve.sparse["int4"] == pytest.approx(want.sparse["int4"], rel=1e-4)
    assert len(mixture) == 2 * (4 + 3 * 4)


def test_a_rare_expert_is_less_sensitive_by_its_share(
    make: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    """With random weights all experts lose alike, each in proportion to the tokens that it sees."""
    gate = "model.layers.0.block_sparse_moe.gate.weight"
    folder = damaged(
        make("mixtral"), tmp_path / "model", tensors(lambda found: found[gate][0].mul_(8))
    )
    text = Calibration(source=str(text_file), num_samples=32, seq_len=32)
    recipe = Recipe(model=str(folder), method="sparsegpt", calibration=text)
    curves = examine(recipe, Space()).curves
    with stream(ModelFolder.open(folder)) as layers:
        steps = walk(layers, samples(text_file, folder, 32), Walk(frozenset({"act_norm"})))
        layer = next(steps)
        layer.observe()
        shares = torch.tensor([use.square for use in layer.uses.values()])
    names = [f"block_sparse_moe.experts.{expert}.w3" for expert in range(4)]
    losses = torch.tensor([curves[f"model.layers.0.{n}"].sparse["int4"][0] for n in names])
    assert float(shares.max() / shares.min()) > 4
    ratio = losses / shares
    assert float(ratio.max() / ratio.min()) < 2


def test_together_equal_experts_are_as_sensitive_as_the_mlp_that_each_is(
    text_file: Path, tmp_path: Path
) -> None:
    """Tokens are dealt out to them, and so are losses; a rare one has lent sums."""
    mixture, dense = one_expert(tmp_path)
    gate = "model.layers.0.block_sparse_moe.gate.weight"

    def deal(found: dict[str, torch.Tensor]) -> None:
        for name in [name for name in found if "layers.0.block_sparse_moe.experts." in name]:
            found[name] = found[re.sub(r"experts\.\d", f"experts.{CHOSEN}", name)].clone()
        found[gate].normal_(generator=torch.Generator().manual_seed(1))
        found[gate][OTHERS[0]] *= 0.2

    dealt = damaged(mixture, tmp_path / "dealt", tensors(deal))
    text = Calibration(source=str(text_file), num_samples=24, seq_len=32)
    curves, want = (
        examine(Recipe(model=str(folder), method="wanda", calibration=text), Space()).curves
        for folder in (dealt, dense)
    )
    with stream(ModelFolder.open(dealt)) as layers:
        steps = walk(layers, samples(text_file, dealt, 24), Walk(frozenset({"act_norm"})))
        layer = next(steps)
        layer.observe()
        tokens = [use.tokens for use in layer.uses.values()]
    assert 0 < min(tokens) < MIN_TOKENS < sorted(tokens)[1]
    for old, new in (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj")):
        names = [f"model.layers.0.block_sparse_moe.experts.{e}.{old}" for e in range(4)]
        whole = want[f"model.layers.0.mlp.{new}"].fixed["2:4", "int8"]
        losses = [curves[name].fixed["2:4", "int8"] for name in names]
        assert sum(losses) == pytest.approx(whole, rel=0.15)
        for loss, count in zip(losses, tokens, strict=True):
            assert loss / whole == pytest.approx(count / sum(tokens), rel=0.4)


def test_experts_without_tokens_take_what_is_cheapest(
    text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, _ = one_expert(tmp_path)
    text = Calibration(source=str(text_file), num_samples=4, seq_len=32)
    recipe = Recipe(model=str(folder), method="sparsegpt", calibration=text)
    with caplog.at_level("INFO"):
        found = answer(recipe, parse_budget("4bits"))
    # vLLM's plugin, where it was loaded before, adds a handler.
    (said,) = {line for line in caplog.messages if "no token" in line}
    assert said.startswith("no token of the text reaches 6 experts, which therefore take what is")
    best = next(row for row in found["rows"] if row["name"] == "int4 measured")
    chosen = Recipe.from_dict(best["recipe"])
    with open_job(chosen) as job:
        formats = job.formats
    ways: dict[bool, set[str]] = {True: set(), False: set()}
    for name, fmt in formats.items():
        if "experts" in name:
            ways[f"experts.{CHOSEN}." in name].add(fmt.spec)
    assert ways[False] == {"bitmask/0.85/int4:64", "bitmask/0.85/int4:128"}
    assert not ways[True] & ways[False]
    prune(chosen, tmp_path / "out")


# What is wrong with a folder is one sentence, and nothing is written.

GATE = "model.layers.1.mlp.gate.weight"
LAST = "model.layers.1.mlp.experts.3"
LLAMA4 = "model.layers.1.feed_forward.experts"
Tensors = dict[str, torch.Tensor]


def lose_an_expert(found: Tensors) -> None:
    for name in [name for name in found if name.startswith(f"{LAST}.")]:
        del found[name]


def one_more_expert(found: Tensors) -> None:
    for name in [name for name in found if name.startswith(f"{LAST}.")]:
        found[name.replace(".3.", ".4.")] = found[name].clone()


def fused_as_well(found: Tensors) -> None:
    parts = (found[f"{LAST}.{role}.weight"] for role in ("gate_proj", "up_proj"))
    found[f"{LAST[:-2]}.gate_up_proj"] = torch.cat(list(parts)).expand(4, -1, -1).contiguous()


def one_by_one_as_well(found: Tensors) -> None:
    found[f"{LLAMA4}.2.down_proj.weight"] = found[f"{LLAMA4}.down_proj"][2].t().contiguous()


def poison(found: Tensors) -> None:
    found[f"{LAST}.up_proj.weight"][3, 5] = float("nan")


DAMAGES: dict[str, tuple[str, Callable[[Tensors], object], str]] = {
    "lost linear": (
        "qwen3 moe", lambda t: t.pop(f"{LAST}.up_proj.weight"),
        f"tensor {LAST}.up_proj.weight is missing.",
    ),
    "lost expert": ("qwen3 moe", lose_an_expert, f"tensor {LAST}.gate_proj.weight is missing."),
    "lost tensor of all": (
        "llama 4 text (fused)", lambda t: t.pop(f"{LLAMA4}.down_proj"),
        f"tensor {LLAMA4}.0.down_proj.weight is missing.",
    ),
    "one more expert": (
        "qwen3 moe", one_more_expert,
        "model.layers.1.mlp.experts.4.down_proj.weight is there, but config.json says 4 experts.",
    ),
    "router of another width": (
        "qwen3 moe", lambda t: t.update({GATE: t[GATE][:3].clone()}),
        f"{GATE} is stored as [3, 64], but config.json makes it [4, 64].",
    ),
    "expert of another width": (
        "qwen3 moe", lambda t: t.update({f"{LAST}.up_proj.weight": torch.ones(64, 64)}),
        f"{LAST}.up_proj.weight is stored as [64, 64], but config.json makes it [128, 64].",
    ),
    "fused tensor of another number": (
        "llama 4 text (fused)",
        lambda t: t.update({f"{LLAMA4}.down_proj": t[f"{LLAMA4}.down_proj"][:3].clone()}),
        f"{LLAMA4}.down_proj is stored as [3, 128, 64], but config.json makes it [4, 128, 64].",
    ),
    "fused as well": (
        "qwen3 moe", fused_as_well,
        "model.layers.1.mlp.experts.0.gate_proj.weight is stored twice, by itself and in "
        "model.layers.1.mlp.experts.gate_up_proj.",
    ),
    "one by one as well": (
        "llama 4 text (fused)", one_by_one_as_well,
        f"{LLAMA4}.2.down_proj.weight is stored twice, by itself and in {LLAMA4}.down_proj.",
    ),
    "NaN in an expert": (
        "qwen3 moe", poison, f"{LAST}.up_proj.weight holds NaN or Inf: the checkpoint is damaged.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_sentence(make: Callable[[str], Path], damage: str, tmp_path: Path) -> None:
    family, change, sentence = DAMAGES[damage]
    folder = damaged(make(family), tmp_path / "model", tensors(change))
    recipe = Recipe(model=str(folder), method="magnitude", calibration=None)
    with pytest.raises(CheckpointError) as caught:
        prune(recipe, tmp_path / "out")
    assert str(caught.value).removeprefix(f"{folder}: ") == sentence
    assert not (tmp_path / "out").exists()


PACKED: dict[str, tuple[Callable[[Tensors], object], str]] = {
    "lost linear": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith(f"{LAST}.up_proj.")],
        f"the packed weight of {LAST}.up_proj is missing.",
    ),
    "one more expert": (
        one_more_expert,
        "mlp.experts.4.down_proj.bitmask is there, but config.json says 4 experts.",
    ),
    "router of another width": (
        lambda t: t.update({GATE: t[GATE][:3].clone()}),
        f"{GATE}: stored as [3, 64], but config.json makes it [4, 64].",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", PACKED)
def test_damage_to_a_packed_folder_is_one_sentence(
    make: Callable[[str], Path], damage: str, tmp_path: Path
) -> None:
    change, sentence = PACKED[damage]
    recipe = Recipe(model=str(make("qwen3 moe")), method="magnitude", calibration=None)
    prune(recipe, tmp_path / "packed")
    folder = damaged(tmp_path / "packed", tmp_path / "damaged", tensors(change))
    with pytest.raises(CheckpointError, match=re.escape(sentence)):
        packed.load(folder)


def test_columns_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    folder = save_family("qwen3 moe", tmp_path / "model", moe_intermediate_size=72)
    recipe = {"model": str(folder), "method": "magnitude", "calibration": None, "pattern": "8:16"}
    with pytest.raises(PatternError, match=r"layers\.0\.mlp\.experts\.0\.down_proj: 72 columns"):
        prune(Recipe.from_dict(recipe), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prune(Recipe.from_dict(recipe | {"ignore": ["experts.*.down_proj"]}), tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [({"num_local_experts": MOST_EXPERTS + 1}, f"claims {MOST_EXPERTS + 1} experts for model"),
     ({"num_local_experts": 10**7}, "claims 10000000 experts for model"),
     ({"num_experts_per_tok": 5}, "gives a token 5 of 4 experts"),
     ({"num_experts_per_tok": 0}, "gives a token 0 of 4 experts")],
)  # fmt: skip
def test_absurd_numbers_of_experts_are_refused(
    make: Callable[[str], Path], fields: dict[str, int], sentence: str, tmp_path: Path
) -> None:
    folder = damaged(make("qwen3 moe"), tmp_path / "model", config(lambda c: c.update(fields)))
    with pytest.raises(CheckpointError, match=sentence):
        prune(Recipe(model=str(folder), method="magnitude", calibration=None), tmp_path / "out")
