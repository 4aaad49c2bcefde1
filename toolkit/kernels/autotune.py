"""Which of several ways to compute the same thing is the fastest: measured once, kept on disk.

Nothing here knows of GPUs: what runs and what measures it are arguments.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from gblm.cache import cache_folder, keep

logger = logging.getLogger(__name__)

# Of the time: what is so close to the fastest that another reason may decide.
TIE = 0.02
FILE, VERSION = "autotune.json", 1
FILE_BYTES, MAX_ANSWERS = 1 << 20, 2048
KEY, ANSWER = re.compile(r"[ -~]{1,400}"), re.compile(r"[a-z0-9_]{1,40}")

Key = tuple[str | int, ...]
Timer = Callable[[Callable[[], object]], float]


def fastest(seconds: Mapping[str, float]) -> str:
    """The first of those within 2 % of the least time."""
    limit = min(seconds.values()) * (1 + TIE)
    return next(name for name, time in seconds.items() if time <= limit)


def never_slower(seconds: Mapping[str, Sequence[float]], baseline: str) -> str:
    """The fastest in all that is nowhere more than 2 % slower than the baseline.

    Args:
        seconds: of each candidate, the times at the same sizes; the baseline is one of them.
        baseline: what is always good enough.
    """
    bounds = [time * (1 + TIE) for time in seconds[baseline]]
    good = {
        name: sum(time / bound for time, bound in zip(times, bounds, strict=True))
        for name, times in seconds.items()
        if all(time <= bound for time, bound in zip(times, bounds, strict=True))
    }
    return fastest(good)


class Answers:
    """Answers by key, in one JSON file that processes share; a bad file counts as none.

    Attributes:
        path: of the file; in gblm's cache if None was given.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = cache_folder() / FILE if path is None else path
        self._found: dict[str, str] | None = None

    def get(self, key: str) -> str | None:
        """The answer, if there is one; the file is read once."""
        if self._found is None:
            self._found = _read(self.path)
        return self._found.get(key)

    def put(self, key: str, answer: str) -> None:
        """Keep an answer, and those that other processes have written; forget the oldest."""
        found = _read(self.path)
        found.pop(key, None)
        found[key] = answer
        self._found = dict(list(found.items())[-MAX_ANSWERS:])
        content = {"version": VERSION, "answers": self._found}
        keep(self.path, json.dumps(content, indent=0).encode())


def _read(path: Path) -> dict[str, str]:
    """What a file holds that can be an answer; nothing of a file that is not one of ours."""
    try:
        if path.stat().st_size > FILE_BYTES:
            return {}
        content = json.loads(path.read_bytes())
        if content["version"] != VERSION:
            return {}
        pairs = list(content["answers"].items())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.info("gblm: %s is of no use (%s); it is made anew", path.name, type(error).__name__)
        return {}
    return {key: answer for key, answer in pairs if _is_answer(key, answer)}


def _is_answer(key: object, answer: object) -> bool:
    texts = isinstance(key, str) and isinstance(answer, str)
    return texts and bool(KEY.fullmatch(str(key)) and ANSWER.fullmatch(str(answer)))


class Autotuner:
    """Chooses among candidates: by what it remembers, by the file, or by measuring.

    Measuring waits for the device, so it happens once per key, and never while a CUDA graph is
    being captured.

    Attributes:
        timer: the seconds of a call.
        settled: the answers that this process goes by.
    """

    def __init__(
        self, answers: Answers, facts: Key, timer: Timer, capturing: Callable[[], bool]
    ) -> None:
        """Prepare; nothing is read or measured.

        Args:
            answers: kept ones.
            facts: of the machine and the software; part of every key in the file.
            timer: the seconds of a call.
            capturing: whether nothing may be measured at the moment.
        """
        self.timer = timer
        self._answers, self._facts, self._capturing = answers, facts, capturing
        self.settled: dict[Key, str] = {}
        self._unmeasured: set[Key] = set()

    def settle(
        self, key: Key, find: Callable[[], str | None], accepts: Callable[[str], bool], default: str
    ) -> str:
        """The answer of a key.

        Args:
            key: what is asked; the same question has the same key.
            find: measures; None where it cannot say, which holds for this process.
            accepts: whether an answer from the file is possible.
            default: while nothing may be measured, and where `find` cannot say.
        """
        known = self.settled.get(key)
        if known is not None:
            return known
        text = " ".join(map(str, (*self._facts, *key)))
        kept = self._answers.get(text)
        if kept is not None and accepts(kept):
            self.settled[key] = kept
            return kept
        if self._capturing():
            if key not in self._unmeasured:
                logger.info("gblm: %s not measured before a graph is captured: %s", key, default)
                self._unmeasured.add(key)
            return default
        answer = find()
        if answer is not None:
            self._answers.put(text, answer)
        self.settled[key] = default if answer is None else answer
        return self.settled[key]

    def choose(
        self,
        key: Key,
        names: Sequence[str],
        make: Callable[[str], Callable[[], object]],
        default: str,
    ) -> str:
        """The fastest of some candidates; of those within 2 % the first.

        Args:
            key: what is asked.
            names: of the candidates.
            make: the call of a candidate; asked for only when it is measured.
            default: while nothing may be measured, or when nothing can run.
        """

        def find() -> str | None:
            seconds = self.measure(key, names, make)
            return fastest(seconds) if seconds else None

        return self.settle(key, find, names.__contains__, default)

    def measure(
        self, key: Key, names: Sequence[str], make: Callable[[str], Callable[[], object]]
    ) -> dict[str, float]:
        """Seconds of the candidates that can run; of none when the memory does not suffice."""
        seconds = {}
        for name in names:
            try:
                seconds[name] = self.timer(make(name))
            except torch.OutOfMemoryError:
                logger.info("gblm: too little memory to measure %s for %s", name, key)
                return {}
            except RuntimeError as error:
                why = (str(error).splitlines() or [""])[0]
                logger.info("gblm: %s cannot run for %s: %s", name, key, why)
        logger.debug("gblm: measured for %s: %s", key, seconds)
        return seconds
