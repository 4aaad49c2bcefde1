"""Own text: what the dense model itself writes, to calibrate and recover on without a data set.

Half of it are chats, whose questions the model invents, too; half runs freely from the start of a
text. A model without a chat template writes the second kind only. The text depends on the model and
the seed; it is kept in the cache.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from gblm.cache import cache_folder
from gblm.errors import MachineError
from gblm.files import write_json

logger = logging.getLogger(__name__)
LENGTH = 512
# Sequences that are written at a time; transformers holds the caches of a few only.
MOST, BATCH = 256, 32
MARK = "\ue000"


class Sampler(Protocol):
    """Continues prompts at temperature 1, from the whole distribution."""

    def __call__(self, prompts: Sequence[Sequence[int]], seed: int, ends: bool) -> list[list[int]]:
        """Return up to LENGTH further tokens of each prompt.

        Args:
            prompts: token ids.
            seed: of the draw.
            ends: whether a sequence stops behind the end-of-text or end-of-turn token.
        """


def own_text(folder: Path, tokenizer: Any, num_tokens: int, seed: int) -> list[int]:
    """Return at least `num_tokens` token ids that the model wrote, as one stream.

    Args:
        folder: of the dense model.
        tokenizer: of the model.
        num_tokens: how many are wanted.
        seed: of the draw.

    Raises:
        MachineError: the engine that writes it failed.
    """
    facts = [folder.resolve().name, _weights(folder), num_tokens, seed, LENGTH]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    kept = cache_folder() / "own-text" / f"{digest}.json"
    if not kept.exists():
        logger.info("%s writes %d tokens of text", folder, num_tokens)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, _write(_sampler(folder), tokenizer, num_tokens, seed))
    found: list[int] = json.loads(kept.read_text())
    return found


def _write(sample: Sampler, tokenizer: Any, num_tokens: int, seed: int) -> list[int]:
    chats = tokenizer.chat_template is not None
    found: list[int] = []
    while len(found) < num_tokens:
        rest = -(-(num_tokens - len(found)) // (LENGTH * (1 + chats)))
        count = min(MOST, rest)
        found += [token for row in _free(sample, tokenizer, count, seed) for token in row]
        if chats:
            found += [token for row in _chats(sample, tokenizer, count, seed + 1) for token in row]
        seed += 2
    return found


def _free(sample: Sampler, tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    return sample([[start]] * count, seed, ends=False)


def _chats(sample: Sampler, tokenizer: Any, count: int, seed: int) -> list[list[int]]:
    """Whole chats of one question and one answer, with the template's own tokens."""
    opened = _template(tokenizer, MARK).partition(MARK)[0]
    ask = tokenizer(opened, add_special_tokens=False)["input_ids"]
    invented = sample([ask] * count, seed, ends=True)
    questions = tokenizer.batch_decode(invented, skip_special_tokens=True)
    asked = [
        tokenizer(_template(tokenizer, question), add_special_tokens=False)["input_ids"]
        for question in questions
    ]
    answers = sample(asked, seed, ends=True)
    return [question + answer for question, answer in zip(asked, answers, strict=True)]


def _template(tokenizer: Any, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text


def _weights(folder: Path) -> list[tuple[str, int, int]]:
    files = sorted(folder.glob("*.safetensors"))
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def _sampler(folder: Path) -> Sampler:
    """Return vLLM's offline engine where it is installed; transformers takes ten times as long."""
    return _Vllm(folder) if importlib.util.find_spec("vllm") is not None else _Transformers(folder)


class _Vllm:
    """vLLM in a process of its own, which gives its memory back."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, prompts: Sequence[Sequence[int]], seed: int, ends: bool) -> list[list[int]]:
        """See Sampler."""
        with tempfile.TemporaryDirectory() as work:
            asked, answered = Path(work) / "asked.json", Path(work) / "answered.json"
            asked.write_text(
                json.dumps({"prompts": prompts, "seed": seed, "ends": ends, "length": LENGTH})
            )
            command = [
                sys.executable, "-m", "gblm.serve.sample", str(self.folder), str(asked),
                str(answered),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise MachineError(f"{self.folder}: vLLM could not write text: {last}")
            found: list[list[int]] = json.loads(answered.read_text())
        return found


class _Transformers:
    """The model in transformers, in this process."""

    def __init__(self, folder: Path) -> None:
        from gblm.model.loading import load

        self.model: Any = load(folder)

    def __call__(self, prompts: Sequence[Sequence[int]], seed: int, ends: bool) -> list[list[int]]:
        """See Sampler."""
        rows: list[list[int]] = []
        for at in range(0, len(prompts), BATCH):
            rows += self._batch(prompts[at : at + BATCH], seed + at, ends)
        return rows

    def _batch(self, prompts: Sequence[Sequence[int]], seed: int, ends: bool) -> list[list[int]]:
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + list(p) for pad, p in zip(pads, prompts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, max_new_tokens=LENGTH, pad_token_id=0,
                **({} if ends else {"eos_token_id": -1}),
            )  # fmt: skip
        stops = set(_stops(self.model)) if ends else set()
        return [_until(row, stops) for row in out[:, longest:].tolist()]


def _stops(model: Any) -> list[int]:
    found = model.generation_config.eos_token_id
    return list(found) if isinstance(found, list) else [found]


def _until(row: list[int], stops: set[int]) -> list[int]:
    return row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))]
