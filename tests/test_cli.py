"""The command line as a user meets it: help, JSON, exit codes, one sentence per mistake."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import pytest
import torch
from click.testing import CliRunner
from conftest import Outcome, Pack

from gblm.cli import COMMANDS, cli
from gblm.commands import common

Run = Callable[..., Outcome]


def test_every_command_has_help() -> None:
    groups = {"bench": ("kernels", "watch"), "export": ("dense", "pack", "onnx")}
    for name in COMMANDS:
        for words in ([name], *([name, inner] for inner in groups.get(name, ()))):
            done = CliRunner().invoke(cli, [*words, "--help"])
            assert done.exit_code == 0, words
            assert "Usage: " in done.output


def test_help_lists_every_command(gblm: Run) -> None:
    done = gblm("--help")
    assert all(name in done.out for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "code", "sentence"),
    [
        (["prone"], 2, "Commands: prune, experts, eval"),
        (["prune", "MODEL"], 2, "Missing option '--output'"),
        (["prune", "--output", "o"], 2, "Missing argument 'MODEL'"),
        (["prune", "MODEL", "--output", "o", "--method", "wunda"], 2, "choose from magnitude"),
        (["prune", "MODEL", "--output", "o", "--pattern", "4:2"], 4, "N weights kept of M"),
        (
            ["prune", "MODEL", "--output", "o", "--alpha", "1", "--method", "wanda"],
            2,
            "it takes no options",
        ),
        (
            ["prune", "MODEL", "--output", "o", "--rounding", "obs", "--method", "wanda"],
            2,
            "rounding obs goes with codes: give values",
        ),
        (["search", "MODEL", "--budget", "3.5"], 2, "give bits per pruned weight"),
        (
            ["search", "MODEL", "--budget", "3bits", "--pattern", "0.5"],
            2,
            "which decides the sparsity",
        ),
        (["prune", "MODEL", "--output", "o", "--ignore", "zzz"], 2, "matches no linear"),
        (["prune", "MODEL", "--output", "o", "--pattern", "2:5"], 4, "q_proj: 64 columns"),
        (["prune", "MODEL", "--output", "o", "--calibration", "x.txt"], 4, "does not exist"),
        (["prune", "MODEL", "--output", "o", "--calibration", "pile"], 2, "pydoc, wikitext2, c4"),
        (["prune", "MODEL", "--output", "."], 4, "exists"),
        (["prune", "./nowhere", "--output", "o"], 4, "no such folder"),
        (["prune", "MODEL", "--output", "o", "--device", "warp"], 2, "use cpu, cuda"),
        (["eval", "./nowhere"], 4, "no such folder"),
        (["inspect", "."], 4, "config.json is missing"),
        (["inspect", "MODEL", "--verify"], 4, "no packed weights"),
        (["export", "dense", "MODEL", "--output", "o"], 4, "no packed weights"),
        (["export", "pack", "MODEL", "--output", "o"], 4, "packing would make it larger"),
        (["fetch", "gpt5"], 2, "choose from smollm2"),
        (["recover", "p", "--output", "o", "--learning-rate", "0"], 2, "range x>0"),
        (["serve", "MODEL", "--backend", "dense"], 4, "applies to packed folders only"),
        (["bench", "./nowhere"], 4, "no such folder"),
        (["bench", "transformers:MODEL", "--concurrency", "2"], 2, "runs one request at a time"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_get_one_sentence_and_their_exit_code(
    gblm: Run, tiny: Path, words: list[str], code: int, sentence: str
) -> None:
    done = gblm(*[word.replace("MODEL", str(tiny)) for word in words], HF_HUB_OFFLINE="1")
    assert done.code == code, done
    assert sentence in done.err.replace("\n", " "), done
    assert "Traceback" not in done.err
    assert done.out == ""


def test_memory_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    for error in (MemoryError(), torch.OutOfMemoryError("CUDA: no room."), caught.value):
        assert common.report_error(error, {}) == 3
        said = capsys.readouterr().err
        assert said.startswith("gblm: error: out of memory: ")
        assert said.endswith(". Lower --seq-len, or use another device.\n")
        assert ".." not in said


def changed(**fields: object) -> Callable[[Path], None]:
    """Change config.json; None removes a field."""

    def damage(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text()) | fields
        kept = {name: value for name, value in found.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))

    return damage


def cut(name: str) -> Callable[[Path], None]:
    """Leave the beginning of a file."""
    return lambda folder: os.truncate(folder / name, 400)


# What is done to a model folder → what every command says of it.
BROKEN: dict[str, tuple[Callable[[Path], None], str]] = {
    "not JSON": (cut("config.json"), "config.json cannot be read as JSON"),
    "a size in words": (changed(hidden_size="wide"), "hidden_size is 'wide', not a whole number"),
    "another size": (changed(hidden_size=96), "but config.json makes it"),
    "a size is missing": (changed(hidden_size=None), "but config.json makes it"),
    "no model_type": (changed(model_type=None), "model_type 'None'"),
    "a type of no library": (changed(model_type="nonsense"), "model_type 'nonsense'"),
    "truncated weights": (cut("model.safetensors"), "is no intact safetensors file"),
    "truncated tokenizer": (cut("tokenizer.json"), "tokenizer could not be loaded"),
}
# Commands that look at the weights alone, or at what no tokenizer is needed for, take some of them.
HEADERS_ONLY = ("another size", "a size is missing", "no model_type", "a type of no library")
ROADS = {
    "prune": ["prune", "BAD", "--method", "wanda", "--calibration", "TEXT", "--num-samples", "2",
              "--seq-len", "16", "--output", "out"],
    "eval": ["eval", "BAD", "--text", "TEXT", "--seq-len", "16"],
    "serve": ["serve", "BAD"],
    "export pack": ["export", "pack", "BAD", "--pattern", "dense", "--output", "out"],
    "export onnx": ["export", "onnx", "BAD", "--output", "out"],
    "export dense": ["export", "dense", "BAD", "--output", "out"],
    "inspect": ["inspect", "BAD"],
    "bench": ["bench", "transformers:BAD"],
    "recover": ["recover", "PACKED", "--baseline", "BAD", "--text", "TEXT", "--held-out", "TEXT",
                "--tokens", "64", "--seq-len", "16", "--output", "out"],
    "search": ["search", "BAD", "--budget", "5bits", "--calibration", "TEXT", "--num-samples", "2",
               "--seq-len", "16"],
}  # fmt: skip
WITHOUT_TOKENIZER = ("serve", "export pack", "export dense", "inspect", "bench")


@pytest.mark.slow
@pytest.mark.parametrize("road", ROADS)
def test_a_broken_model_gets_one_line(
    gblm: Run, tiny: Path, pack_tiny: Pack, text_file: Path, tmp_path: Path, road: str
) -> None:
    for number, (name, (damage, sentence)) in enumerate(BROKEN.items()):
        if road == "inspect" and name in HEADERS_ONLY:
            continue
        if road in WITHOUT_TOKENIZER and "tokenizer" in name:
            continue
        good = pack_tiny() if road == "export dense" else tiny
        bad = Path(shutil.copytree(good, tmp_path / str(number)))
        damage(bad)
        places = {"BAD": bad, "PACKED": pack_tiny(), "TEXT": text_file}
        words = [str(places.get(word, word.replace("BAD", str(bad)))) for word in ROADS[road]]
        done = gblm(*words, HF_HUB_OFFLINE="1")
        # An engine of a benchmark is a process of its own, which ends.
        assert done.code in (4, 3 if road == "bench" else 4), (name, done)
        assert sentence in done.err.splitlines()[-1], (name, done)
        assert done.err.splitlines()[-1].startswith("gblm: error: "), (name, done)
        assert "Traceback" not in done.err, (name, done)
        assert not (tmp_path / "out").exists(), name


def test_whole_road_in_json(gblm: Run, tiny: Path, text_file: Path, tmp_path: Path) -> None:
    pruned = gblm(
        "--json", "prune", tiny, "--method", "gblm", "--pattern", "2:4", "--calibration", text_file,
        "--num-samples", 2, "--seq-len", 16, "--seed", 0, "--dtype", "float32", "--output", "out",
    )  # fmt: skip
    assert pruned.code == 0, pruned
    assert json.loads(pruned.out)["linears"] == 14
    for words in (
        ["inspect", "out"],
        ["inspect", "out", "--verify"],
        ["export", "dense", "out", "--output", "dense"],
        ["inspect", "out", "dense", "--verify"],
        ["export", "pack", "dense", "--output", "packed"],
        [
            "eval",
            "out",
            "--baseline",
            tiny,
            "--text",
            text_file,
            "--seq-len",
            32,
            "--max-windows",
            1,
        ],
    ):
        done = gblm(*words, "--json")
        assert done.code == 0, done
        assert len(done.out.strip().splitlines()) == 1
        assert isinstance(json.loads(done.out), dict)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names >= {
        "config.json", "model.safetensors", "recipe.json", "sparsity_report.json",
        "MANIFEST.json", "README.md", "tokenizer.json",
    }  # fmt: skip
    again = gblm("prune", "--recipe", "out/recipe.json", "--output", "again", "-q")
    assert (again.code, again.out, again.err) == (0, "", "")
    conflict = gblm("prune", "--recipe", "out/recipe.json", "--output", "x", "--seed", 1)
    assert conflict.code == 2


def test_errors_are_json_too(gblm: Run) -> None:
    done = gblm("inspect", "nowhere/at/all", "--json")
    assert done.code == 4
    assert json.loads(done.out) == {
        "error": "model nowhere/at/all: there is no such folder.", "exit_code": 4,
    }  # fmt: skip
    assert json.loads(gblm("--json", "prune").out)["exit_code"] == 2


@pytest.mark.parametrize(
    ("command", "option", "good", "bad"),
    [
        ("prune", "shrinkage", ("0", "0.33"), ("1", "-0.1")),
        ("prune", "num_samples", ("1",), ("0", "0.5")),
        ("recover", "learning_rate", ("3e-4",), ("0",)),
        ("recover", "minutes", ("0.5",), ("0",)),
    ],
)
def test_an_option_takes_what_its_field_takes(
    command: str, option: str, good: Sequence[str], bad: Sequence[str]
) -> None:
    made = cli.get_command(click.Context(cli), command)
    assert made is not None
    (found,) = (parameter for parameter in made.params if parameter.name == option)
    assert [found.type.convert(text, found, None) for text in good] == [
        float(text) for text in good
    ]
    for text in bad:
        with pytest.raises(click.BadParameter):
            found.type.convert(text, found, None)


def test_the_help_names_every_method_and_kind_of_value(gblm: Run) -> None:
    from gblm.methods import METHODS
    from gblm.sparse.values import KINDS

    text = " ".join(gblm("prune", "--help").out.split())
    assert ", ".join(METHODS) in text
    assert all(f"{name} ({kind.about})" in text for name, kind in KINDS.items())
    assert "--damping FLOAT alps, sparsegpt: " in text


def test_serving_the_current_folder_runs_none_of_its_files(packed: Path, tmp_path: Path) -> None:
    """A vLLM that only imports torch stands in for the real one, behind the current folder."""
    from gblm.serve.access import Server
    from gblm.serve.launch import command, environment

    def write(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    for name in ("torch.py", "vllm.py", "gblm/__init__.py"):
        write(packed / name, f"open({str(tmp_path / 'ran')!r}, 'w')")
    stand_in = f"def main():\n    import torch\n    open({str(tmp_path / 'arrived')!r}, 'w')"
    for name in (".", "entrypoints", "entrypoints/cli"):
        write(tmp_path / "path/vllm" / name / "__init__.py", "")
    write(tmp_path / "path/vllm/entrypoints/cli/main.py", stand_in)
    server, paths = Server(packed), [str(tmp_path / "path"), os.environ.get("PYTHONPATH")]
    # An empty entry would be the current folder.
    env = environment(server, os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))})
    subprocess.run(
        command(server), cwd=packed, env=env, capture_output=True, check=False, timeout=60
    )
    assert (tmp_path / "arrived").exists()
    assert not (tmp_path / "ran").exists()


def test_verbose_shows_the_traceback(gblm: Run) -> None:
    assert "Traceback" in gblm("inspect", ".", "-v").err


def test_doctor_tests_every_backend(gblm: Run) -> None:
    done = gblm("doctor", "--json")
    assert done.code == 0, done
    from gblm.kernels import BACKENDS

    facts = json.loads(done.out)
    assert facts["ok"]
    assert set(facts["backends"]) == set(BACKENDS)


def test_completion_answers(gblm: Run) -> None:
    done = gblm(_GBLM_COMPLETE="bash_complete", COMP_WORDS="gblm pr", COMP_CWORD="1")
    assert "prune" in done.out


def test_progress_bars_stay_away_without_a_terminal(gblm: Run, tiny: Path, text_file: Path) -> None:
    done = gblm("prune", tiny, "--calibration", text_file, "--num-samples", 2, "--seq-len", 16,
                "--output", "out")  # fmt: skip
    assert done.code == 0, done
    assert "\r" not in done.err
    assert "%|" not in done.err


def test_without_a_terminal_a_line_breaks_the_silence(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(common, "LOG_SECONDS", 0.03)
    counted = common.Counted()

    def told(words: str) -> None:
        while words not in caplog.messages:
            time.sleep(0.01)

    with caplog.at_level("INFO", logger="gblm"), common.heartbeat(lambda: counted.words):
        told("still at work")
        step = counted("pruning", 2)
        told("pruning: 0 of 2")
        step()
        told("pruning: 1 of 2")
        step()
        caplog.clear()
        told("still at work")
    caplog.clear()
    time.sleep(0.1)
    assert not caplog.messages
