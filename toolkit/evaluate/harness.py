"""lm-evaluation-harness, unchanged: our models behind its classes, and its client as a subject.

HF and packed models are its HFLM, exported ones its ONNXRuntimeGenAILM, and a running server is its
own client.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from torch import Tensor

from gblm.errors import DAMAGE, InputError, MachineError, UsageError
from gblm.evaluate.subjects import Scores, Subject, TorchSubject
from gblm.evaluate.tasks import Tasks
from gblm.model.folder import ModelFolder
from gblm.network import get, is_loopback, server_address
from gblm.record import Row

SECONDS, MAX_BYTES = 60.0, 2**20
# Metric → its unit; others of the harness are left out.
METRICS = {"acc": "share", "acc_norm": "share", "exact_match": "share", "word_perplexity": ""}
# Standard errors on both sides of a mean, for an interval of 95 %.
ERRORS = 1.96


class ServedSubject(Subject):
    """This subject is the first model of a running server, through the harness's own client.

    `folder` is what the server loaded it from, if that is on this machine; `max_tokens` fit into
    the model, None where the server does not say. `connect` makes the client.
    """

    engine = "server"
    dtype = "dtype of the server"

    def __init__(self, url: str, key: str | None = None) -> None:
        """Ask the server what it serves.

        Args:
            url: its address, with or without /v1.
            key: the API key, if it asks for one.

        Raises:
            UsageError: the address is none.
            InputError: the answer is not that of an OpenAI server.
            MachineError: there is no answer, or it is not 200.
        """
        self.url, self._key = server_address("MODEL", url, key, "/v1"), key
        card = self._card()
        self.name: str = card["id"]
        self.max_tokens: int | None = card.get("max_model_len")
        root = Path(str(card.get("root")))
        here = is_loopback(urlsplit(self.url).hostname or "") and root.is_absolute()
        found = here and (root / "config.json").is_file()
        self.folder = ModelFolder.open(root) if found else None

    def connect(self, home: ModelFolder) -> None:
        """Make the client, which reads the tokenizer of a folder itself.

        Raises:
            MachineError: a package that the client needs is missing.
        """
        header = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        try:
            self.client = LocalCompletionsAPI(
                model=self.name, base_url=f"{self.url}/v1/completions",
                tokenizer=str(home), tokenizer_backend="huggingface",
                max_length=self.max_tokens or 2048, header={"Accept": "*/*", **header},
            )  # fmt: skip
        except ModuleNotFoundError as error:
            raise MachineError(
                f"evaluating a server needs more ({error}): pip install 'gblm-toolkit[eval]'."
            ) from error

    def score(self, window: Tensor) -> Scores:
        """Score a window [seq_len] int64 as a prompt; only log-probs of its own tokens are known.

        Raises:
            UsageError: it does not fit into the model beside the token that is generated.
            MachineError: the server does not answer, or not with 200.
            InputError: it answers with something else than log-probs.
        """
        if self.max_tokens is not None and len(window) >= self.max_tokens:
            raise UsageError(
                f"{self.url} takes {self.max_tokens - 1} tokens and one to generate, not "
                f"{len(window)}: lower --seq-len."
            )
        try:
            answer = self.client.model_call([window.tolist()], generate=False)
        except OSError as error:  # what `requests` raises
            raise MachineError(f"{self.url}/v1/completions failed: {error}.") from error
        try:
            found = answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(window)]
            if len(found) != len(window) - 1 or not all(map(math.isfinite, found)):
                raise ValueError("not one log-prob for each token")
        except DAMAGE as error:
            raise InputError(
                f"{self.url}/v1/completions does not echo the prompt with log-probs, as vLLM's "
                "server does: it cannot be scored."
            ) from error
        return Scores(torch.tensor(found, dtype=torch.float32))

    def _card(self) -> dict[str, Any]:
        """Ask what the server says of its first model."""
        url = f"{self.url}/v1/models"
        answer = get("MODEL", url, self._key, SECONDS, MAX_BYTES)
        try:
            card: dict[str, Any] = json.loads(answer)["data"][0]
            if isinstance(card["id"], str) and isinstance(card.get("max_model_len", 0), int):
                return card
        except (*DAMAGE, RecursionError):
            pass
        raise InputError(f"{url} names no model: is this the address of a vLLM server?")


@functools.cache
def _manager(task_path: Path | None) -> Any:
    """Make the harness's list of tasks once, as that takes it seconds."""
    return TaskManager(include_path=str(task_path) if task_path else None)


def check_tasks(tasks: Tasks) -> None:
    """Raise UsageError for a task that the harness does not know."""
    unknown = [task for task in tasks.names if not _manager(tasks.path).match_tasks([task])]
    if unknown:
        raise UsageError(
            f"--tasks {unknown[0]}: lm-evaluation-harness knows no such task; give --task-path "
            "DIR for those of your own."
        )


def run_tasks(
    tasks: Tasks, sides: Mapping[str, Subject], tokenizer: Any, max_length: int
) -> list[Row]:
    """Run the tasks on each side, on the same examples.

    Raises:
        UsageError: the engine of a side cannot do it.
        InputError: the harness could not load or run a task.
    """
    rows: list[Row] = []
    for side, subject in sides.items():
        for task, values in _run(subject, tokenizer, max_length, tasks).items():
            found = list(_rows(side, tasks, task, values))
            if not found and task in tasks.names:
                raise InputError(f"task {task} gives none of {', '.join(METRICS)}.")
            rows += found
    return rows


def _run(subject: Subject, tokenizer: Any, max_length: int, tasks: Tasks) -> dict[str, Any]:
    """Let the harness run tasks without examples in the prompt, and give its results by task."""
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    try:
        found = simple_evaluate(
            model=_as_lm(subject, tokenizer, max_length), tasks=list(tasks.names), num_fewshot=0,
            limit=tasks.limit, task_manager=_manager(tasks.path), log_samples=False,
            **dict.fromkeys(seeds, 0),
        )  # fmt: skip
    except Exception as error:
        raise InputError(
            f"tasks {', '.join(tasks.names)} could not be run by lm-evaluation-harness: {error}"
        ) from error
    results: dict[str, Any] = found["results"]
    return results


def _as_lm(subject: Subject, tokenizer: Any, max_length: int) -> Any:
    if isinstance(subject, ServedSubject):
        return subject.client
    if isinstance(subject, TorchSubject):
        return HFLM(pretrained=subject.model, tokenizer=tokenizer, batch_size=1)
    return ONNXRuntimeGenAILM(str(subject.folder), max_length=max_length)


def _rows(side: str, tasks: Tasks, task: str, values: dict[str, Any]) -> Iterator[Row]:
    """Read the harness's "metric,filter" and "metric_stderr,filter"."""
    filters = {key.partition(",")[2] for key in values if key.partition(",")[0] in METRICS}
    for key, value in values.items():
        metric, _, chosen = key.partition(",")
        if metric not in METRICS:
            continue
        error = values.get(f"{metric}_stderr,{chosen}")
        # A mean of one example has none.
        half = ERRORS * error if isinstance(error, float) else None
        interval = None if half is None else (value - half, value + half)
        load = tasks.line(task) + (f", {chosen}" if len(filters) > 1 else "")
        yield Row(side, load, metric, METRICS[metric], float(value), (), interval)
