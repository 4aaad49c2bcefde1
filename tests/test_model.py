from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import save_tiny_model

from gblm.errors import InputError, MachineError, UsageError
from gblm.model.folder import ModelFolder, resolve
from gblm.model.linears import prunable
from gblm.model.loading import auto_dtype, check_device, fast_dtype, load


def test_every_linear_of_the_decoder_layers_is_prunable(tiny: Path) -> None:
    names = list(prunable(load(tiny)))
    assert len(names) == 14
    assert names[0] == "model.layers.0.self_attn.q_proj"
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_ignored_linears_are_left_out(tiny: Path) -> None:
    mlp = prunable(load(tiny), ignore=("*.self_attn.*", "down_proj"))
    assert {name.rpartition(".")[2] for name in mlp} == {"gate_proj", "up_proj"}


def test_ignoring_everything_is_an_error(tiny: Path) -> None:
    with pytest.raises(UsageError, match="leaves no linear"):
        prunable(load(tiny), ignore=("*",))


def test_a_model_without_decoder_layers_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    # GPT-2 has layers, but no nn.Linear in them.
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)).save_pretrained(
        tmp_path
    )
    with pytest.raises(InputError, match="GPT2LMHeadModel has no decoder layers"):
        prunable(load(tmp_path))


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil"}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    (tmp_path / "m/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(InputError, match="never executes code"):
        load(tmp_path / "m")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "x.pth"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    save_tiny_model(tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    torch.save({}, tmp_path / "m" / name)
    with pytest.raises(InputError, match=f"{name}, a pickle"):
        load(tmp_path / "m")


def test_folders_that_are_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json is missing"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be read as JSON"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no"):
        load(tmp_path)


def test_unknown_model_names_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="no such folder"):
        resolve("./missing")
    with pytest.raises(InputError, match="gblm fetch smollm2"):
        resolve("nobody/nothing")


def test_hub_ids_are_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository, commit = tmp_path / "models--somebody--tiny", "0" * 40
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    assert resolve("somebody/tiny") == snapshot


def test_devices_are_checked() -> None:
    with pytest.raises(UsageError):
        check_device("warp")
    with pytest.raises(UsageError):
        check_device("meta")
    if not torch.cuda.is_available():
        with pytest.raises(MachineError, match="no CUDA device"):
            check_device("cuda")


@pytest.mark.parametrize(
    ("has", "stored", "wanted"),
    [("AMD avx2", "bfloat16", "float32"), ("AMD avx512_bf16", "bfloat16", "bfloat16"),
     ("Intel avx512_bf16", "bfloat16", "float32"), ("Intel amx_bf16", "bfloat16", "bfloat16"),
     ("ARM bf16", "bfloat16", "bfloat16"), ("Intel amx_bf16", "float16", "float32"),
     ("Intel avx512_fp16", "float16", "float16"), ("AMD avx2", "float32", "float32")],
)  # fmt: skip
def test_a_cpu_computes_in_what_it_multiplies_fastest(
    has: str, stored: str, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vendor, name = has.split()
    capable = {name: True, "avx512_f": True, "cpu_name": f"{vendor} CPU"}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: capable)
    given = getattr(torch, stored)
    assert fast_dtype(given) == getattr(torch, wanted)
    assert fast_dtype(given, "cuda:0") == given
    for key in ("dtype", "torch_dtype"):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", key: stored}))
        found = auto_dtype(ModelFolder.open(tmp_path))
        assert (found or given) == getattr(torch, wanted)
