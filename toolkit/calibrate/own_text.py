"""Own text: what the dense model itself writes, to calibrate and recover on without a data set.

Half of it are chats, whose questions the model invents, too; half runs freely from the start of a
text. A model without a chat template writes the second kind only. The text depends on the model and
the seed. It is written in rounds, which are kept in the cache: who wants more goes on from there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import torch

from gblm.cache import alone, cache_folder
from gblm.errors import MachineError
from gblm.files import write_json

logger = logging.getLogger(__name__)
# Tokens of a sequence.
LENGTH = 512
# Sequences of each kind in a round: twice as many each time, for larger batches write faster.
FIRST, MOST = 16, 64
# Sequences that transformers writes at a time: their cache lies in memory.
BATCH = 32


# Continues prompts (token ids) at temperature 1 by up to LENGTH tokens, given a seed and, for each
# prompt, whether it stops behind the end-of-text or end-of-turn token.
Sampler = Callable[[Sequence[Sequence[int]], int, Sequence[bool]], list[list[int]]]


def own_text(folder: Path, tokenizer: Any, num_tokens: int, seed: int) -> list[int]:
    """Return the first `num_tokens` token ids of the endless text that the model writes.

    Raises:
        MachineError: the engine that writes it failed.
    """
    facts = json.dumps([folder.resolve().name, _weights(folder), seed, LENGTH, FIRST, MOST])
    kept = cache_folder() / "own-text" / hashlib.sha256(facts.encode()).hexdigest()[:16]
    found, _ = _read(kept, num_tokens)
    if len(found) >= num_tokens:
        return found[:num_tokens]
    with alone(kept):
        found, number = _read(kept, num_tokens)  # another process may have written it by now
        if len(found) < num_tokens:
            logger.info("%s writes %d tokens of text", folder, num_tokens - len(found))
            kept.mkdir(parents=True, exist_ok=True)
            with _engine()(folder) as sample:
                while len(found) < num_tokens:
                    count = min(FIRST << number, MOST)
                    text = _round(sample, tokenizer, (seed << 24) + 2 * number, count)
                    write_json(kept / f"{number}.json", text)
                    found, number = found + text, number + 1
                    logger.info("round %d of that text is written", number)
    return found[:num_tokens]


def _read(kept: Path, num_tokens: int) -> tuple[list[int], int]:
    """Read rounds until there are enough tokens, or no more rounds; count them."""
    found: list[int] = []
    number = 0
    while len(found) < num_tokens and (path := kept / f"{number}.json").exists():
        found, number = found + json.loads(path.read_text()), number + 1
    return found, number


def _round(sample: Sampler, tokenizer: Any, seed: int, count: int) -> list[int]:
    """Write free text and, with the template's own tokens, chats of one question and one answer."""
    start = tokenizer.bos_token_id
    start = tokenizer.eos_token_id if start is None else start
    free = [[start]] * count
    if tokenizer.chat_template is None:
        return _joined(sample(free, seed, [False] * count))
    # What the template writes before a question.
    mark = "\ue000"
    ask = _ids(tokenizer, _template(tokenizer, mark).partition(mark)[0])
    rows = sample(free + [ask] * count, seed, [False] * count + [True] * count)
    questions = tokenizer.batch_decode(rows[count:], skip_special_tokens=True)
    asked = [_ids(tokenizer, _template(tokenizer, question)) for question in questions]
    logger.info("free text and questions are written; now the answers")
    answers = sample(asked, seed + 1, [True] * count)
    chats = [question + answer for question, answer in zip(asked, answers, strict=True)]
    return _joined(rows[:count] + chats)


def _joined(rows: Sequence[Sequence[int]]) -> list[int]:
    return [token for row in rows for token in row]


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found


def _template(tokenizer: Any, question: str) -> str:
    chat = [{"role": "user", "content": question}]
    text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return text


def _weights(folder: Path) -> list[tuple[str, int, int]]:
    files = sorted(folder.glob("*.safetensors"))
    return [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]


def _engine() -> Callable[[Path], AbstractContextManager[Sampler]]:
    """Return vLLM's offline engine where it is installed; transformers takes ten times as long."""
    return in_vllm if importlib.util.find_spec("vllm") is not None else in_transformers


@contextmanager
def in_vllm(folder: Path) -> Iterator[Sampler]:
    """Open vLLM in a process of its own, which gives its memory back."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "gblm.serve.sample", str(folder), str(LENGTH)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        ask, answered = cast(IO[str], process.stdin), cast(IO[str], process.stdout)

        def answer() -> Any:
            try:
                return json.loads(answered.readline())
            except json.JSONDecodeError as error:
                process.wait()
                log.seek(0)
                last = (log.read().strip().splitlines() or ["no message"])[-1]
                raise MachineError(f"{folder}: vLLM could not write text: {last}") from error

        def sample(
            prompts: Sequence[Sequence[int]], seed: int, ends: Sequence[bool]
        ) -> list[list[int]]:
            with suppress(BrokenPipeError):  # the missing answer says why
                ask.write(json.dumps({"prompts": prompts, "seed": seed, "ends": ends}) + "\n")
                ask.flush()
            found: list[list[int]] = answer()
            return found

        try:
            logger.info("vLLM started in %s s", answer()["seconds"])
            yield sample
        finally:
            process.kill()
            process.communicate()


@contextmanager
def in_transformers(folder: Path) -> Iterator[Sampler]:
    """Load the model in this process."""
    from gblm.model.folder import ModelFolder
    from gblm.model.loading import auto_dtype, load

    model: Any = load(folder, auto_dtype(ModelFolder.open(folder)))
    stops = model.generation_config.eos_token_id
    stops = set(stops) if isinstance(stops, list) else {stops}

    def batch(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = torch.tensor([[0] * pad + list(p) for pad, p in zip(pads, prompts, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads])
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                top_p=1.0, max_new_tokens=LENGTH, pad_token_id=0, eos_token_id=-1,
            )  # fmt: skip
        found: list[list[int]] = out[:, longest:].tolist()
        return found

    def sample(
        prompts: Sequence[Sequence[int]], seed: int, ends: Sequence[bool]
    ) -> list[list[int]]:
        torch.manual_seed(seed)
        batches = [prompts[at : at + BATCH] for at in range(0, len(prompts), BATCH)]
        rows = [row for some in batches for row in batch(some)]
        return [_until(row, stops) if end else row for row, end in zip(rows, ends, strict=True)]

    yield sample


def _until(row: list[int], stops: set[int]) -> list[int]:
    return row[: next((i + 1 for i, token in enumerate(row) if token in stops), len(row))]
