"""Tasks by lm-evaluation-harness, unchanged: our models behind its own classes.

HF and packed models are its HFLM; what has no torch model is scored as windows of tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gblm.errors import InputError, UsageError
from gblm.evaluate.subjects import Subject, TorchSubject


class SubjectLM(TemplateLM):
    """Log-likelihood tasks on anything that scores windows."""

    def __init__(self, subject: Subject, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.subject = subject
        self.tokenizer = tokenizer
        self.max_length = max_length

    @property
    def eot_token_id(self) -> int:
        """What stands before a continuation without context; the start token if there is one."""
        own = self.tokenizer
        return int(own.eos_token_id if own.bos_token_id is None else own.bos_token_id)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, without special tokens unless they are asked for, as HFLM has them."""
        ids: list[int] = self.tokenizer(string, add_special_tokens=bool(add_special_tokens))[
            "input_ids"
        ]
        return ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for _, context, continuation in requests:
            # As HFLM: what does not fit is cut from the left.
            tokens = torch.tensor((context + continuation)[-self.max_length :])
            scores = self.subject.score(tokens)
            count = min(len(continuation), len(tokens) - 1)
            own = scores.logprobs[-count:]
            greedy = bool((scores.top1[-count:] == tokens[-count:]).all())
            found.append((float(own.sum()), greedy))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Refused: perplexity has protocols of its own here."""
        raise UsageError(
            f"--engine {self.subject.engine}: tasks of rolling log-likelihood (perplexity) need hf "
            "or packed; use --text for perplexity."
        )

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Refused: a scorer generates nothing."""
        raise UsageError(
            f"--engine {self.subject.engine}: tasks that generate text need --engine hf or packed."
        )


@functools.cache
def _manager(task_path: Path | None) -> Any:
    """The harness's list of tasks, which takes it seconds, so that it is made once."""
    return TaskManager(include_path=str(task_path) if task_path else None)


def check_known(tasks: Sequence[str], task_path: Path | None) -> None:
    """Refuse what the harness does not know.

    Raises:
        UsageError: a task is unknown.
    """
    unknown = [task for task in tasks if not _manager(task_path).match_tasks([task])]
    if unknown:
        raise UsageError(
            f"--tasks {unknown[0]}: lm-evaluation-harness knows no such task; give --task-path "
            "DIR for those of your own."
        )


def run(
    subject: Subject,
    tokenizer: Any,
    max_length: int,
    tasks: list[str],
    task_path: Path | None,
    limit: int | None,
    seed: int,
) -> dict[str, Any]:
    """Let the harness run tasks without examples in the prompt, and give its results by task.

    Raises:
        UsageError: a task is unknown, or the engine cannot do it.
        InputError: the harness could not load or run a task.
    """
    check_known(tasks, task_path)
    model = (
        HFLM(pretrained=subject.model, tokenizer=tokenizer, batch_size=1)
        if isinstance(subject, TorchSubject)
        else SubjectLM(subject, tokenizer, max_length)
    )
    try:
        found = simple_evaluate(
            model=model, tasks=tasks, num_fewshot=0, limit=limit, task_manager=_manager(task_path),
            random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed,
            fewshot_random_seed=seed, log_samples=False,
        )  # fmt: skip
    except UsageError:
        raise
    except Exception as error:
        raise InputError(
            f"tasks {', '.join(tasks)} could not be run by lm-evaluation-harness: {error}"
        ) from error
    results: dict[str, Any] = found["results"]
    return results
