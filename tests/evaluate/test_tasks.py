"""Tasks: a local one, offline, through lm-evaluation-harness, the same on every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import Outcome

from gblm.errors import InputError, UsageError
from gblm.evaluate.run import Evaluation, run_evaluation
from gblm.evaluate.subjects import open_subject
from gblm.evaluate.tasks import PAPERS, Tasks, task_names
from gblm.model.folder import ModelFolder
from gblm.model.loading import load_tokenizer
from gblm.record import Record

TASKS = Path(__file__).parent / "tasks"
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@pytest.fixture(scope="module")
def task_path(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One folder for all tests: the harness reads its list of tasks once for each."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness: make dev installs it")
    folder = tmp_path_factory.mktemp("lm-eval") / "tasks"
    folder.mkdir()
    text = (TASKS / "tiny_choice.yaml").read_text()
    place = str(TASKS / "tiny_choice.jsonl")
    (folder / "tiny_choice.yaml").write_text(text.replace("DATA", place))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder.parent / "cache"))
        for key, value in OFFLINE.items():
            patch.setenv(key, value)
        yield folder


def test_names_of_the_papers() -> None:
    assert task_names("papers") == PAPERS
    assert len(PAPERS) == 7
    assert task_names("tiny, boolq,papers") == ("tiny", "boolq", *(p for p in PAPERS[1:]))


@pytest.mark.slow
def test_every_engine_gives_the_same_scores(
    task_path: Path, tiny: Path, pack_tiny: Callable[..., Path], exported: Path
) -> None:
    from gblm.evaluate.harness import run_tasks

    tasks = Tasks(("tiny_choice",), task_path)
    tokenizer = load_tokenizer(tiny)
    packed = open_subject(ModelFolder.open(pack_tiny()), dtype="float32")
    dense = open_subject(ModelFolder.open(tiny), dtype="float32")
    sides = {
        "packed": packed,
        "onnx": open_subject(ModelFolder.open(exported)),
        "dense": dense,
    }
    rows = run_tasks(tasks, sides, tokenizer, 512)
    found = {(row.side, row.metric): row for row in rows}
    for metric in ("acc", "acc_norm"):
        row, other = found["packed", metric], found["onnx", metric]
        assert (row.value, row.interval) == (other.value, other.interval)
        assert row.interval is not None
        assert row.interval[0] < row.value < row.interval[1]
        assert ("dense", metric) in found


def test_each_filter_of_a_metric_has_a_row_of_its_own() -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness: make dev installs it")
    from gblm.evaluate.harness import _rows

    values = {"alias": "t", "exact_match,strict": 1.0, "exact_match,flexible": 0.0}
    strict, flexible = _rows("half", Tasks(("t",)), "t", values)
    assert (strict.value, flexible.value) == (1.0, 0.0)
    assert strict.load.partition(", strict")[0] == flexible.load.partition(", flexible")[0]
    assert strict.load != flexible.load


@pytest.mark.slow
def test_the_harness_loads_exports_by_itself(
    pack_tiny: Callable[..., Path], exported: Path, tmp_path: Path
) -> None:
    """Its onnxruntime-genai backend; and onnxruntime, which loads no library of operators."""
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness: make dev installs it")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM
    from lm_eval.models.onnxruntime_ort import ONNXRuntimeLM

    from gblm.export.onnx.export import Wanted, export_onnx

    export_onnx(pack_tiny(), tmp_path / "dense", Wanted(validate=0))
    packed = open_subject(ModelFolder.open(pack_tiny()), dtype="float32")
    tokenizer, pair = load_tokenizer(pack_tiny()), ("The quick brown fox", " jumps over")
    asked = [(pair, tokenizer(pair[0])["input_ids"], tokenizer(pair[1])["input_ids"])]
    torch_model = HFLM(pretrained=packed.model, tokenizer=tokenizer, batch_size=1)
    ((want, _),) = torch_model._loglikelihood_tokens(asked, disable_tqdm=True)
    for backend, folder in (
        (ONNXRuntimeGenAILM, exported),
        (ONNXRuntimeGenAILM, tmp_path / "dense"),
        (ONNXRuntimeLM, tmp_path / "dense"),
    ):
        ((got, _),) = backend(pretrained=str(folder))._loglikelihood_tokens(asked)
        assert got == pytest.approx(want, abs=2e-3)


@pytest.mark.slow
def test_the_command_keeps_stderr_and_protocol_in_the_record(
    gblm: Callable[..., Outcome], task_path: Path, pack_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    done = gblm(
        "eval", pack_tiny(), "--tasks", "tiny_choice", "--task-path", task_path, "--limit", 4,
        "--gate", "acc(tiny_choice) >= -100pt", "--gate", "acc_norm(tiny_choice) >= 1.01",
        "--output", "record.json", **OFFLINE,
    )  # fmt: skip
    assert done.code == 5, done
    assert "gate failed: acc_norm(tiny_choice) >= 1.01" in done.err
    record = Record.read(tmp_path / "record.json")
    assert len(record.sides) == 2
    for side in record.sides:
        (row,) = [row for row in record.rows if (row.side, row.metric) == (side, "acc")]
        assert row.load.startswith("tiny_choice, lm-eval")
        assert "0-shot, the first 4 examples, seed 0" in row.load
        assert 4 * row.value in (0, 1, 2, 3, 4)
        # Of the mean of four zeros and ones; all of one kind have none.
        error = 1.96 * (row.value * (1 - row.value) / 3) ** 0.5
        assert row.interval == pytest.approx((row.value - error, row.value + error))
    said = [note.partition(":")[0] for note in record.verdict.notes]
    assert said == ["baseline", "gate passed", "gate failed"]


def test_an_unknown_task_is_refused_before_a_model_is_looked_for(task_path: Path) -> None:
    tasks = Tasks(("tiny_choice", "tiny_chioce"), task_path)
    with pytest.raises(UsageError, match=r"--tasks tiny_chioce: .* knows no such task"):
        run_evaluation(Evaluation("./nowhere", (), tasks))
    with pytest.raises(InputError, match="there is no such folder"):
        run_evaluation(Evaluation("./nowhere", (), Tasks(("tiny_choice",), task_path)))
