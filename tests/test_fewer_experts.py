"""Whole experts removed: the folder is an ordinary one and computes what a masked router would."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import Once, Run
from damage import config, damaged
from safetensors.torch import load_file
from test_experts import one_expert
from test_families import EXPERTS, save_family
from transformers import AutoModelForCausalLM

from gblm import packed
from gblm.calibrate.experts import counted
from gblm.calibrate.walk import Walk, walk
from gblm.errors import GblmError, InputError, UsageError
from gblm.export.dense import export_dense
from gblm.model.experts import blocks
from gblm.model.folder import ModelFolder
from gblm.model.layers import stream
from gblm.prune import prune
from gblm.prune.experts import check_count, remove_experts
from gblm.prune.job import open_job
from gblm.recipe import Calibration, Recipe

IDS = torch.arange(40).reshape(2, 20) * 5
COUNT, KEEP = 8, 5


@pytest.fixture(scope="session")
def make(once: Once) -> Callable[[str], Path]:
    """Makes a model of a family with eight experts, once."""
    return lambda family: once(f"eight-{family[:8].replace(' ', '-')}", partial(_save, family))


def _save(family: str, folder: Path) -> None:
    save_family(family, folder, num_experts=COUNT, num_local_experts=COUNT)


def text(text_file: Path) -> Calibration:
    return Calibration(source=str(text_file), num_samples=4, seq_len=32)


def plain(folder: Path) -> Any:
    """The model as transformers alone loads it."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", experts_implementation="eager"
    )
    return model.eval()


def fused(model: Any) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "gate_up_proj")]


@contextmanager
def without(model: Any, gone: list[list[int]]) -> Iterator[None]:
    """Let each layer's router give −∞ for some experts."""
    linear = torch.nn.functional.linear
    weights = [p for p in model.parameters() if p.ndim == 2 and len(p) == COUNT]
    of = {id(weight): own for weight, own in zip(weights, gone, strict=True)}

    def masked(inputs: torch.Tensor, weight: torch.Tensor, *more: Any) -> torch.Tensor:
        out = linear(inputs, weight, *more)
        rows = torch.tensor(of.get(id(weight), []), dtype=torch.int64)
        return out.index_fill(-1, rows, float("-inf"))

    with patch.object(torch.nn.functional, "linear", masked):
        yield


@pytest.mark.parametrize("by", ["reap", "frequency"])
@pytest.mark.parametrize("family", EXPERTS)
def test_it_computes_what_a_router_without_the_others_would(
    make: Callable[[str], Path], family: str, by: str, text_file: Path, tmp_path: Path
) -> None:
    """In transformers' own classes, bit for bit; pruned and packed like any other folder.

    In float64, as products with smaller matrices round otherwise; without AVX-512 so does softmax,
    which is in float32. Llama 4 sums over all experts.
    """
    folder, out = make(family), tmp_path / "out"
    report = remove_experts(folder, out, KEEP, by, text(text_file))
    kept = list(report["kept"].values())
    assert [len(own) for own in kept] == [KEEP, KEEP]
    assert all(own == sorted(own) for own in kept)
    model, smaller = plain(folder).double(), plain(out).double()
    assert [len(module.down_proj) for module in fused(smaller)] == [KEEP, KEEP]
    gone = [[e for e in range(COUNT) if e not in own] for own in kept]
    with torch.no_grad():
        whole, got = model(IDS).logits, smaller(IDS).logits
        with without(model, gone):
            want = model(IDS).logits
    is_exact = torch.backends.cpu.get_cpu_capability() == "AVX512" and "llama 4" not in family
    torch.testing.assert_close(got, want, rtol=0, atol=0 if is_exact else 1e-5)
    assert (whole - want).norm() > 0.01 * whole.norm()
    recipe = Recipe(model=str(out), method="wanda", calibration=text(text_file))
    prune(recipe, tmp_path / "packed")
    export_dense(ModelFolder.open(tmp_path / "packed"), tmp_path / "dense")
    with torch.no_grad():
        want = plain(tmp_path / "dense")(IDS).logits
        assert torch.equal(packed.load(tmp_path / "packed", "dense")(IDS).logits, want)


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3 moe", "granite moe (fused)"])
def test_what_experts_are_worth_is_what_hooks_on_the_model_see(
    make: Callable[[str], Path], family: str, text_file: Path, tmp_path: Path
) -> None:
    folder = make(family)
    recipe = Recipe(model=str(folder), method="wanda", calibration=text(text_file))
    with open_job(recipe) as job:
        batches = job.batches()
    model, seen = plain(folder).float(), list[tuple[torch.Tensor, ...]]()
    first = fused(model)[0]
    first.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    with stream(ModelFolder.open(folder), torch.float32) as layers:
        steps = walk(layers, batches, Walk(frozenset(), runs=True))
        layer = next(steps)
        with counted(layer.module) as uses:
            layer.run()
    tokens, worth = [], []
    for expert, use in enumerate(uses.values()):
        norms = torch.cat([outputs(first, expert, *args) for args in seen])
        assert use.tokens == len(norms)
        assert use.added == pytest.approx(float(norms.sum()), rel=1e-4)
        tokens.append(len(norms))
        worth.append(float(norms.mean()) if len(norms) else 0.0)
    assert sum(tokens) == 2 * sum(batch.numel() for batch in batches)
    for by, values in (("frequency", tokens), ("reap", worth)):
        best = torch.tensor(values).topk(KEEP).indices.sort().values.tolist()
        report = remove_experts(
            folder, tmp_path / by, KEEP, by, text(text_file), dtype="float32"
        )  # fmt: skip
        assert next(iter(report["kept"].values())) == best
    share = sum(sorted(tokens)[-KEEP:]) / sum(tokens)
    assert 0 < share < 1


def outputs(
    module: Any, expert: int, hidden: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The router's weight of each token of an expert, times the norm of what the expert gives."""
    token, place = torch.where(chosen == expert)
    gate, up = torch.nn.functional.linear(hidden[token], module.gate_up_proj[expert]).chunk(2, -1)
    out = torch.nn.functional.linear(module.act_fn(gate) * up, module.down_proj[expert])
    return (weights[token, place] * out.norm(dim=-1)).detach()


def test_an_expert_that_no_token_reaches_goes_first(text_file: Path, tmp_path: Path) -> None:
    folder, _ = one_expert(tmp_path)
    for by in ("reap", "frequency"):
        report = remove_experts(folder, tmp_path / by, 1, by, text(text_file))
        assert report["share"] == 1.0
        with torch.no_grad():
            assert torch.equal(plain(tmp_path / by)(IDS).logits, plain(folder)(IDS).logits)


@pytest.mark.parametrize("family", ["qwen3 moe", "llama 4 text (fused)"])
def test_the_files_are_called_as_those_of_the_source(
    gblm: Run, make: Callable[[str], Path], family: str, text_file: Path, tmp_path: Path
) -> None:
    done = gblm(
        "experts", make(family), "--keep", 3, "--output", tmp_path / "out", "--calibration",
        text_file, "--num-samples", 2, "--seq-len", 16, "--max-shard-size", "100KB", "--json",
    )  # fmt: skip
    report = json.loads(done.out)
    assert (report["experts"], report["keep"], report["layers"]) == (COUNT, 3, 2)
    before = load_file(make(family) / "model.safetensors")
    after = {
        n: t for f in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(f).items()
    }
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert after.keys() == {n for n in before if not any(f"experts.{e}." in n for e in range(3, 8))}
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["num_local_experts"] == 3
    assert (tmp_path / "out/tokenizer.json").exists()


def test_what_cannot_be_removed_is_one_sentence(
    make: Callable[[str], Path], text_file: Path, tmp_path: Path
) -> None:
    folder, out = make("qwen3 moe"), tmp_path / "out"
    dense = save_family("qwen3", tmp_path / "dense")
    nameless = damaged(folder, tmp_path / "nameless", config(lambda c: c.pop("num_local_experts")))
    grouped = damaged(folder, tmp_path / "grouped", config(lambda c: c.update(n_group=2)))
    cases: list[tuple[Path, int, type[GblmError], str]] = [
        (folder, 8, UsageError, "have 8 experts, and a token uses 2 of them; keep 2 to 7."),
        (folder, 1, UsageError, "have 8 experts, and a token uses 2 of them; keep 2 to 7."),
        (dense, 4, InputError, "has no experts to remove."),
        (grouped, 4, InputError, "choose among 2 groups of experts first"),
    ]
    for model, keep, kind, sentence in cases:
        with pytest.raises(kind, match=sentence):
            remove_experts(model, out, keep, text=text(text_file))
    with pytest.raises(GblmError):
        remove_experts(nameless, out, 4, text=text(text_file))
    assert not out.exists()
    assert not list(tmp_path.glob(".out*"))


def test_layers_must_have_equally_many(tmp_path: Path) -> None:
    save_family("qwen3 moe", tmp_path / "model")
    with stream(ModelFolder.open(tmp_path / "model")) as layers:
        del blocks(layers.model)[0][1][3]
        with pytest.raises(InputError, match="have 3 to 4 experts"):
            check_count(layers, 2)
