from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from alike import assert_same_tensors
from conftest import Pack
from damage import UP, damaged, tensors

from gblm.checkpoint.inspect import inspect, verify
from gblm.errors import CheckpointError, InputError, MachineError, PatternError
from gblm.export.dense import export_dense
from gblm.export.pack import export_pack, find_pattern
from gblm.model.folder import ModelFolder
from gblm.sparse.patterns import Unstructured


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "1:4", "0.5", "0.7"])
def test_packing_a_dense_export_gives_the_packed_weights_back(
    pack_tiny: Pack, tmp_path: Path, pattern: str
) -> None:
    folder = pack_tiny("magnitude", pattern)
    export_dense(ModelFolder.open(folder), tmp_path / "dense")
    export_pack(tmp_path / "dense", tmp_path / "again")
    found = inspect(ModelFolder.open(tmp_path / "again"))["groups"][0]
    assert found["format"] == inspect(ModelFolder.open(folder))["groups"][0]["format"]
    assert found["format"] != "nm" or found["pattern"] == pattern
    verify(ModelFolder.open(tmp_path / "again"), against=ModelFolder.open(tmp_path / "dense"))
    assert_same_tensors(folder, tmp_path / "again")


def test_packing_never_prunes(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(PatternError, match="hold 4 non-zeros; 2:4 allows 2"):
        export_pack(tiny, tmp_path / "out", pattern="2:4")
    with pytest.raises(InputError, match="of the weights are zero; packing would make it larger"):
        export_pack(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dense_export_is_an_ordinary_folder(pack_tiny: Pack, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_dense(ModelFolder.open(pack_tiny()), tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(model.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("a")["input_ids"]
    assert not (tmp_path / "dense/MANIFEST.json").exists()


def test_dense_export_refuses_a_dense_folder(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no packed weights"):
        export_dense(ModelFolder.open(tiny), tmp_path / "out")


def test_masks_with_far_more_zeros_than_a_pattern_asks_for_are_stored_as_any_mask() -> None:
    mask = torch.zeros(64, 64, dtype=torch.bool)
    mask[:, ::16] = True  # 2:4, 4:8 and 8:16 would store half of the places
    assert isinstance(find_pattern([("q", mask)]), Unstructured)
    mask[:, ::4] = True
    assert str(find_pattern([("q", mask)])) == "1:4"


def test_a_weight_that_holds_nan_is_refused(tiny: Path, tmp_path: Path) -> None:
    nan = tensors(lambda found: found[f"{UP}.weight"][0].fill_(torch.nan))
    bad = damaged(tiny, tmp_path / "bad", nan)
    with pytest.raises(InputError, match=r"up_proj\.weight holds NaN or Inf, which readers refuse"):
        export_pack(bad, tmp_path / "out", pattern="dense")
    assert not (tmp_path / "out").exists()


def test_a_disk_without_room_for_the_weights_is_said_first(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    # Enough for the files beside the weights, and for nothing else.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=(16 << 20) + 1000))
    with pytest.raises(MachineError, match="GB free"):
        export_pack(tiny, tmp_path / "out", pattern="dense")
