"""`gblm export onnx` on the tiny model: what is written is what torch computes."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Pack, save_tiny_model
from damage import damaged as spoiled
from damage import tensors
from torch import Tensor

from gblm.commands.export import ONNX_PRECISIONS, ONNX_TARGETS
from gblm.errors import (
    CheckpointError,
    GateError,
    InputError,
    MachineError,
    UsageError,
)
from gblm.export.onnx import export, rewrite, runtime
from gblm.export.onnx.export import (
    PRECISIONS,
    Wanted,
    check_target,
    export_onnx,
)
from gblm.export.onnx.runtime import DATA_FILE, LIBRARY_FILE, REPORT_FILE
from gblm.model.folder import ModelFolder
from gblm.model.packed_reader import PackedReader
from gblm.prune import prune
from gblm.recipe import Recipe

pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai: make dev installs it")

import onnx_ir as ir

from gblm.export.onnx.decoder import OnnxDecoder
from gblm.export.onnx.rewrite import LAYER_WEIGHT, read
from gblm.export.onnx.validate import deviation, rounding
from gblm.model.loading import load
from gblm.sparse.formats import Format, Shape

SPARSE = Wanted(sparse=True, validate=16)


def half_of(source: Path, folder: Path, ignore: tuple[str, ...] = ()) -> Path:
    prune(Recipe(model=str(source), method="magnitude", pattern="0.5", ignore=ignore), folder)
    return folder


def graph_of(folder: Path) -> ir.Graph:
    return ir.load(folder / "model.onnx").graph


@pytest.fixture
def damaged(exported: Path, tmp_path: Path) -> Path:
    """A private copy of it."""
    return Path(shutil.copytree(exported, tmp_path / "damaged"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "values", "head", "tied"),
    [
        ("0.5", "float", "float", False),
        ("0.5", "int8", "int8", True),
        ("2:4", "int4", "int8", True),
        ("dense", "int4", "int4", False),
        ("dense", "int4", "int4", True),
        ("dense", "int3", "int4", True),
    ],
)
def test_packed_weights_stay_packed_and_compute_the_same(
    pack_tiny: Pack, tmp_path: Path, pattern: str, values: str, head: str, tied: bool
) -> None:
    source = pack_tiny("magnitude", pattern, values, head, tied)
    report = export_onnx(source, tmp_path / "out", SPARSE)
    found = report["validation"]
    assert found["passed"]
    assert found["device"] == "cpu"
    if values == "float":
        assert found["equal_greedy_tokens"] == 16
    graph = graph_of(tmp_path / "out")
    assert not [node for node in graph if node.op_type in ("MatMul", "Sigmoid")]
    assert sum(node.op_type == "GatedLinear" for node in graph) == 2
    with PackedReader(ModelFolder.open(source)) as reader:
        packed = {name for row in report["linears"] for name in row["linears"]}
        assert set(reader.linears) <= packed


@pytest.mark.slow
def test_dense_graph_keeps_the_zeros(pack_tiny: Pack, tmp_path: Path) -> None:
    report = export_onnx(pack_tiny(), tmp_path / "out", Wanted(validate=16))
    assert report["validation"]["equal_greedy_tokens"] == 16
    stored = graph_of(tmp_path / "out").initializers
    layers = [read(value) for name, value in stored.items() if LAYER_WEIGHT.fullmatch(name)]
    assert len(layers) == 10
    assert all((weight == 0).float().mean() == 0.5 for weight in layers)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "tied"), [("int8", True), ("int4", False)])
def test_own_integers_of_onnx_runtime(
    tiny: Path, tiny_untied: Path, tmp_path: Path, precision: str, tied: bool
) -> None:
    wanted = Wanted(precision=precision, validate=16)
    report = export_onnx(tiny if tied else tiny_untied, tmp_path / "out", wanted)
    found = report["validation"]
    assert (found["passed"], found["wrong_weights"]) == (True, [])
    # More than a float graph would be off: its activations are rounded to int8.
    assert found["logit_deviation"] > 1e-3


def scale_block(codes: Tensor, scales: Tensor) -> None:
    scales.view(-1)[0] *= 1.2


def swap_blocks(codes: Tensor, scales: Tensor) -> None:
    row = codes.view(len(codes), -1)[0]
    row.copy_(row.roll(len(row) // 2))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("sparse", "values", "harm"),
    [(True, "int8", scale_block), pytest.param(True, "int4", swap_blocks, marks=SLOW),
     pytest.param(False, "int4", scale_block, marks=SLOW),
     pytest.param(False, "int8", swap_blocks, marks=SLOW)],
)  # fmt: skip
def test_one_wrong_block_is_refused(
    pack_tiny: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparse: bool, values: str,
    harm: Callable[[Tensor, Tensor], None],
) -> None:  # fmt: skip
    """Of all the weights one group is scaled, or two change places; the logits hardly tell."""

    def prepare(name: str, fmt: Format, parts: dict[str, Tensor], shape: Shape) -> object:
        parts = {part: tensor.clone() for part, tensor in parts.items()}
        if name.endswith("layers.1.self_attn.o_proj"):
            harm(parts["values"], parts["scales"])
        return genuine["prepare"](name, fmt, parts, shape)

    def build(source: Path, output: Path, precision: str, target: str) -> None:
        import onnx

        genuine["build"](source, output, precision, target)
        graph = onnx.load(str(output / "model.onnx"))
        (output / DATA_FILE).unlink()
        tensors = {t.name: t for t in graph.graph.initializer}
        node = next(n for n in graph.graph.node if "layers.1/attn/o_proj/MatMul" in n.name)
        pair = [tensors[name] for name in node.input[1:3]]
        arrays = [torch.from_numpy(onnx.numpy_helper.to_array(one).copy()) for one in pair]
        harm(*arrays)
        for tensor, array in zip(pair, arrays, strict=True):
            tensor.raw_data = array.numpy().tobytes()
        onnx.save(graph, str(output / "model.onnx"), save_as_external_data=True, location=DATA_FILE)

    genuine = {"prepare": rewrite._prepare, "build": export.build}
    if sparse:
        monkeypatch.setattr(rewrite, "_prepare", prepare)
    else:
        monkeypatch.setattr(export, "build", build)
    source = pack_tiny("magnitude", "2:4", values)
    precision = "fp32" if sparse else values
    sentence = r"weight of model.layers.1.self_attn.o_proj \(1 in all\)"
    with pytest.raises(GateError, match=sentence) as error:
        export_onnx(source, tmp_path / "out", Wanted("cpu", precision, sparse, validate=16))
    assert error.value.exit_code == 5
    report = json.loads((tmp_path / "out" / REPORT_FILE).read_text())
    assert report["validation"]["passed"] is False


@pytest.mark.parametrize("values", ["float", pytest.param("int8", marks=SLOW)])
def test_other_arithmetic_is_refused(
    pack_tiny: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: str
) -> None:
    """All weights are right, but positions turn by other angles."""

    def turned(folder: ModelFolder) -> dict[str, object]:
        config = genuine(folder)
        config["rope_parameters"]["rope_theta"] *= 2
        return config

    genuine = export.graph_config
    monkeypatch.setattr(export, "graph_config", turned)
    with pytest.raises(GateError, match=r"off .*, where its arithmetic explains"):
        export_onnx(pack_tiny("magnitude", "2:4", values), tmp_path / "out", SPARSE)


@torch.no_grad()
def test_coarser_arithmetic_explains_more(tiny: Path) -> None:
    model, tokens = load(tiny, dtype=torch.float32), torch.arange(20)
    exact = model(input_ids=tokens[None]).logits[0]
    groups = {module: 32 for module in model.modules() if isinstance(module, torch.nn.Linear)}
    off = [
        deviation(rounding(model, *how, tokens), exact)
        for how in (({}, 16, torch.float32), ({}, 11, torch.float32),
                    (groups, 16, torch.float32), ({}, 16, torch.bfloat16))
    ]  # fmt: skip
    assert 0 < 10 * off[0] < off[1] < off[2] < 1
    assert off[1] < off[3] < 1


def test_what_is_no_number_is_infinitely_far_off() -> None:
    assert deviation(torch.full((2, 3), torch.nan), torch.zeros(2, 3)) == torch.inf


def test_a_model_that_gives_no_numbers_does_not_pass(tiny: Path, tmp_path: Path) -> None:
    broken = tensors(lambda found: found["model.norm.weight"].fill_(torch.nan))
    source = spoiled(tiny, tmp_path / "broken", broken)
    with pytest.raises(GateError, match="differs from the original"):
        export_onnx(source, tmp_path / "out", Wanted(validate=4))


@pytest.mark.slow
def test_cuda_graph_is_written_unproven_when_asked(pack_tiny: Pack, tmp_path: Path) -> None:
    report = export_onnx(pack_tiny(), tmp_path / "out", Wanted("cuda", validate=0))
    assert (report["target"], report["precision"]) == ("cuda", "fp16")
    assert "validation" not in report


def test_cuda_export_cannot_be_validated_without_a_device(tiny: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device; `make test` runs this where there is none")
    with pytest.raises(MachineError, match="--validate 0 writes it unproven"):
        export_onnx(tiny, tmp_path / "out", Wanted("cuda"))


def test_folder_is_complete_and_movable(exported: Path, tmp_path: Path) -> None:
    files = {path.name for path in exported.iterdir()}
    assert {
        "model.onnx", DATA_FILE, LIBRARY_FILE, "config.json", "genai_config.json", "tokenizer.json",
        REPORT_FILE,
    } <= files  # fmt: skip
    assert "quantization_config" not in json.loads((exported / "config.json").read_text())
    config = json.loads((exported / "genai_config.json").read_text())
    assert config["model"]["decoder"]["session_options"]["custom_ops_library"] == LIBRARY_FILE
    assert "/" not in json.loads((exported / REPORT_FILE).read_text())["source"]
    for path in exported.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444, path


def test_onnxruntime_itself_computes_the_same_logits(exported: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(exported / LIBRARY_FILE))
    session = onnxruntime.InferenceSession(
        exported / "model.onnx", options, providers=["CPUExecutionProvider"]
    )
    tokens = torch.tensor([[5, 40, 77, 101]])
    empty = torch.zeros(1, 2, 0, 32).numpy()
    inputs = {node.name: empty for node in session.get_inputs() if node.name.startswith("past")}
    inputs |= {"input_ids": tokens.numpy(), "attention_mask": torch.ones_like(tokens).numpy()}
    logits = session.run(["logits"], inputs)[0]
    assert torch.equal(torch.from_numpy(logits)[0], OnnxDecoder(exported).step(tokens[0]))


def test_cache_has_the_shape_that_other_tools_need(exported: Path) -> None:
    graph = graph_of(exported)
    values = [v for v in (*graph.inputs, *graph.outputs) if v.name.startswith(("past", "present"))]
    shapes = {(v.shape[1], v.shape[3]) for v in values}
    assert (len(values), shapes) == (8, {(2, 32)})


@pytest.mark.slow
def test_linears_that_stay_dense_are_taken_as_bfloat16_and_biases_survive(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "biased", attention_bias=True)
    packed = half_of(source, tmp_path / "packed", ignore=("*.mlp.*",))
    report = export_onnx(packed, tmp_path / "out", SPARSE)
    assert report["validation"]["equal_greedy_tokens"] == 16
    specs = {row["linears"][0].split(".")[-1]: row["spec"] for row in report["linears"]}
    assert specs["gate_proj"] == specs["lm_head"] == "dense/dense"
    assert specs["q_proj"] == "bitmask/0.5"


@pytest.mark.slow
def test_float32_checkpoint_is_refused_when_sparse(tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "wide", dtype="float32")
    packed = half_of(source, tmp_path / "packed")
    with pytest.raises(InputError, match=r"torch\.float32 and not exact in bfloat16"):
        export_onnx(packed, tmp_path / "out", SPARSE)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (Wanted("cpu", "fp16"), "ONNX Runtime cannot run it: its CPU provider fails"),
        (Wanted("cpu", "bf16"), "no MatMul for bfloat16. Choose from fp32, int8, int4"),
        (Wanted("cuda", sparse=True), "has no CUDA kernel yet"),
        (Wanted("cpu", "int8", sparse=True), "prune with --values int8"),
        (Wanted("tpu"), "'tpu' is unknown: choose from cpu, cuda"),
    ],
)
def test_what_cannot_run_is_refused_with_the_reason(
    tiny: Path, tmp_path: Path, wanted: Wanted, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        export_onnx(tiny, tmp_path / "out", wanted)
    assert not (tmp_path / "out").exists()


def test_dense_folder_has_nothing_to_keep_packed(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not packed, so --sparse has nothing to keep"):
        export_onnx(tiny, tmp_path / "out", SPARSE)


def test_command_names_every_target_and_precision() -> None:
    assert set(ONNX_TARGETS) == set(PRECISIONS)
    assert set(ONNX_PRECISIONS) == {name for names in PRECISIONS.values() for name in names}
    assert check_target("cuda", None, sparse=False) == "fp16"


@pytest.mark.slow
def test_weight_that_is_not_the_checkpoints_is_refused(
    pack_tiny: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = pack_tiny("magnitude", "2:4")

    def build_other(source: Path, output: Path, precision: str, provider: str) -> None:
        dense = tmp_path / "other"
        export.export_dense(ModelFolder.open(other), dense, dtype=torch.float32)
        genuine(dense, output, precision, provider)

    genuine = export.build
    monkeypatch.setattr(export, "build", build_other)
    with pytest.raises(CheckpointError, match=r"gate_proj.* is not the checkpoint's"):
        export_onnx(pack_tiny("wanda", "2:4"), tmp_path / "out", SPARSE)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no graph": (lambda f: (f / "model.onnx").unlink(), "is missing: export the model"),
    "no data": (lambda f: (f / DATA_FILE).unlink(), "ONNX Runtime cannot load it"),
    "data cut off": (lambda f: (f / DATA_FILE).write_bytes(b""), "ONNX Runtime cannot load it"),
    "no protobuf": (lambda f: (f / "model.onnx").write_bytes(b"x" * 99), "cannot load it"),
    "no genai config": (lambda f: (f / "genai_config.json").unlink(), "cannot be read as JSON"),
    "no decoder": (lambda f: (f / "genai_config.json").write_text("{}"), "describes no decoder"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_folder_is_refused_with_a_sentence(damaged: Path, name: str) -> None:
    harm, message = DAMAGE[name]
    harm(damaged)
    with pytest.raises(InputError, match=message):
        OnnxDecoder(damaged)


def test_the_folders_own_code_is_not_loaded(damaged: Path) -> None:
    with (damaged / LIBRARY_FILE).open("ab") as file:
        file.write(b"changed")
    with pytest.raises(CheckpointError, match="is not the library of the installed gblm"):
        OnnxDecoder(damaged)
    shutil.copyfile(runtime.library(), damaged / LIBRARY_FILE)
    config = json.loads((damaged / "genai_config.json").read_text())
    config["model"]["vision"] = {"session_options": {"custom_ops_library": "/tmp/evil.so"}}
    (damaged / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="names code that no export of gblm needs"):
        OnnxDecoder(damaged)


def test_tokens_beyond_the_context_are_refused(exported: Path) -> None:
    decoder = OnnxDecoder(exported)
    assert decoder.capacity == 512
    with pytest.raises(UsageError, match="513 tokens after 0: 1 to 512 fit"):
        decoder.run([0] * 513)


def test_mixed_installations_are_named_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(runtime, "_version", installed.get)
    with pytest.raises(MachineError, match=r"overwrite each other.*pip uninstall"):
        runtime.check_installation()
    installed = {"onnx-ir": "1.1", "onnxruntime-gpu": "1.31.1", "onnxruntime-genai": "0.18.0"}
    monkeypatch.setattr(runtime, "_version", installed.get)
    with pytest.raises(MachineError, match="onnxruntime-genai-cuda is not installed"):
        runtime.check_installation()
    monkeypatch.setattr(runtime, "_version", {}.get)
    with pytest.raises(MachineError, match="onnx-ir, onnxruntime, onnxruntime-genai is not"):
        runtime.check_installation()


def test_missing_library_is_named(
    pack_tiny: Pack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gblm.kernels.native.LIBRARY", tmp_path / "none.so")
    with pytest.raises(MachineError, match="the CPU kernels cannot be used"):
        export_onnx(pack_tiny(), tmp_path / "out", SPARSE)


@pytest.mark.real
def test_smollm2_generates_the_same_64_tokens(smollm2: Path, tmp_path: Path) -> None:
    packed = half_of(smollm2, tmp_path / "packed")
    report = export_onnx(packed, tmp_path / "onnx", Wanted(sparse=True))
    assert report["validation"]["equal_greedy_tokens"] == 64
    embeddings = 49152 * 576 * 2
    stored = (packed / "model.safetensors").stat().st_size + embeddings
    written = sum(report["bytes"][name] for name in ("model.onnx", DATA_FILE))
    assert written < 1.02 * stored
