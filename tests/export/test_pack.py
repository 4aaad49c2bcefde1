from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gblm.checkpoint.inspect import inspect
from gblm.checkpoint.verify import verify
from gblm.errors import CheckpointError, InputError, PatternError
from gblm.export.dense import export_dense
from gblm.export.pack import export_pack

Pack = Callable[..., Path]


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "0.5", "0.7"])
def test_packing_a_dense_export_gives_the_packed_weights_back(
    pack_tiny: Pack, tmp_path: Path, pattern: str
) -> None:
    folder = pack_tiny("magnitude", pattern)
    export_dense(folder, tmp_path / "dense")
    export_pack(tmp_path / "dense", tmp_path / "again")
    found = inspect(tmp_path / "again")["groups"][0]
    assert found["format"] == inspect(folder)["groups"][0]["format"]
    verify(tmp_path / "again", against=tmp_path / "dense")
    ours, again = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "again"))
    assert ours.keys() == again.keys()
    assert all(ours[name].equal(again[name]) for name in ours)


def test_packing_never_prunes(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(PatternError, match="hold 4 non-zeros; 2:4 allows 2"):
        export_pack(tiny, tmp_path / "out", pattern="2:4")
    with pytest.raises(InputError, match="of the weights are zero; packing would make it larger"):
        export_pack(tiny, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dense_export_is_an_ordinary_folder(pack_tiny: Pack, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export_dense(pack_tiny(), tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not hasattr(model.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(tmp_path / "dense")("a")["input_ids"]
    assert not (tmp_path / "dense/MANIFEST.json").exists()


def test_dense_export_refuses_a_dense_folder(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no packed weights"):
        export_dense(tiny, tmp_path / "out")
