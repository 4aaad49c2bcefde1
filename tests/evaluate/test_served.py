"""A running server is scored as the model itself; the server here is a small one with vLLM's words.

tests/serve/test_server.py scores a real one.
"""

from __future__ import annotations

import http.server
import json
import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gblm.errors import GblmError, InputError, UsageError
from gblm.evaluate.gates import judge, parse_gate
from gblm.evaluate.perplexity import Protocol
from gblm.evaluate.run import Evaluation, run_evaluation
from gblm.evaluate.subjects import Subject, open_subject
from gblm.model.folder import ModelFolder
from gblm.model.loading import load_tokenizer

pytest.importorskip("lm_eval", reason="lm-evaluation-harness: make dev installs it")
pytest.importorskip("tenacity", reason="lm-eval[api]: make dev installs it")


class Fake(http.server.ThreadingHTTPServer):
    """Answers as vLLM does, from a model in this process; `answers` replaces some of it."""

    def __init__(self, subject: Subject, root: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.subject, self.root = subject, root
        self.answers: dict[str, Any] = {}
        self.status = 200
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def models(self) -> dict:
        card = {"id": "served", "root": self.root, "max_model_len": 257}
        return self.answers.get("models", {"data": [card]})

    def completion(self, asked: dict) -> dict:
        assert (asked["model"], asked["echo"], asked["max_tokens"]) == ("served", True, 1)
        (prompt,) = asked["prompt"]
        found = self.subject.score(torch.tensor(prompt))
        best = found.full.max(-1).values.tolist()
        own = found.logprobs.tolist()
        row = {
            "token_logprobs": [None, *own, -0.5],
            "top_logprobs": [None, *({"x": a, "y": b} for a, b in zip(own, best, strict=True)),
                             {"x": -0.5}],
        }  # fmt: skip
        choice = {"index": 0, "text": "", "logprobs": row}
        return self.answers.get("completion", {"choices": [choice]})


class Handler(http.server.BaseHTTPRequestHandler):
    """GET /v1/models and POST /v1/completions."""

    server: Fake

    def do_GET(self) -> None:
        self.answer("/v1/models", self.server.models())

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer("/v1/completions", self.server.completion(json.loads(body)))

    def answer(self, path: str, found: Any) -> None:
        assert self.path == path
        self.server.keys.append(self.headers["Authorization"])
        data = found if isinstance(found, bytes) else json.dumps(found).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def subject(pack_tiny: Callable[..., Path]) -> Subject:
    return open_subject(ModelFolder.open(pack_tiny()), dtype="float32")


@pytest.fixture
def fake(subject: Subject, pack_tiny: Callable[..., Path]) -> Iterator[Fake]:
    server = Fake(subject, str(pack_tiny()))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_served_model_gets_the_figures_of_the_model(
    fake: Fake, tiny: Path, text_file: Path
) -> None:
    protocol = Protocol(str(text_file), 32, 2)
    record = run_evaluation(Evaluation(f"{fake.url}/v1/", (protocol,), api_key="secret"))
    # The folder that the server names is here, and so are its recipe and size.
    assert list(record.sides) == ["served", "tiny"]
    assert record.verdict.notes == ("baseline: tiny (named by recipe.json)",)
    assert record.sides["served"]["bits_per_weight"] < 16
    assert record.sides["served"]["engine"] == "server"
    assert set(fake.keys) == {"Bearer secret"}
    (load,) = record.loads

    dense, tokenizer = open_subject(ModelFolder.open(tiny)), load_tokenizer(tiny)
    losses, changes = [], []
    for window in protocol.windows(tokenizer):
        ours, theirs = fake.subject.score(window), dense.score(window)
        for place in range(31):
            losses.append(-float(ours.logprobs[place].double()))
            changes.append(abs(float(ours.logprobs[place] - theirs.logprobs[place])))
    found = record.value("served", load, "perplexity")
    assert found == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert record.value("served", load, "drift_mean") == pytest.approx(
        sum(changes) / len(changes), rel=1e-4
    )
    # Its client names no likeliest token and no distribution.
    assert record.metrics == ["perplexity", "drift_mean"]
    with pytest.raises(InputError, match="has no such figure"):
        judge([parse_gate("top1 >= 0")], record)


def test_a_served_model_gets_the_scores_of_the_model(fake: Fake, tiny: Path) -> None:
    from lm_eval.models.huggingface import HFLM

    from gblm.evaluate.harness import ServedSubject

    served, tokenizer = ServedSubject(fake.url), load_tokenizer(tiny)
    served.connect(ModelFolder.open(tiny))
    pair = ("The quick brown fox", " jumps over")
    asked = [(pair, *(tokenizer(text)["input_ids"] for text in pair))]
    own = HFLM(pretrained=fake.subject.model, tokenizer=tokenizer, batch_size=1)
    ((want, greedy),) = own._loglikelihood_tokens(asked, disable_tqdm=True)
    assert served.client._loglikelihood_tokens(asked) == [(pytest.approx(want), greedy)]


def test_a_server_elsewhere_needs_a_baseline(fake: Fake, tiny: Path, text_file: Path) -> None:
    fake.root = "someone/model"
    asked = (fake.url, (Protocol(str(text_file), 32, 1),))
    with pytest.raises(UsageError, match="give --baseline, whose tokens"):
        run_evaluation(Evaluation(*asked))
    record = run_evaluation(Evaluation(*asked, baseline=str(tiny)))
    assert record.verdict.notes == ("baseline: tiny (--baseline)",)
    assert record.metrics == ["perplexity", "drift_mean"]
    assert set(fake.keys) == {None}


def score(url: str, tokenizer: Path) -> None:
    from gblm.evaluate.harness import ServedSubject

    served = ServedSubject(url)
    served.connect(ModelFolder.open(tokenizer))
    served.score(torch.tensor([0, 1]))


def answer(logprobs: object) -> dict:
    return {"completion": {"choices": [{"logprobs": {"token_logprobs": logprobs}}]}}


@pytest.mark.parametrize(
    ("status", "answers", "sentence"),
    [
        (401, {}, "HTTP 401; give the API key with --api-key-file"),
        (404, {}, "is this the address of a vLLM server"),
        (200, {"models": {"data": []}}, "names no model"),
        (200, {"models": {"data": [{"id": 7}]}}, "names no model"),
        (200, {"models": {"data": [{"id": "a", "max_model_len": "9"}]}}, "names no model"),
        (200, {"models": b"<html>"}, "names no model"),
        (200, {"completion": {"choices": [{"text": "a"}]}}, "does not echo the prompt"),
        (200, answer([None]), "does not echo the prompt"),
        (200, answer([None, "nan"]), "does not echo the prompt"),
        (200, answer([None, float("-inf")]), "does not echo the prompt"),
    ],
)
def test_what_a_server_answers_is_not_believed(
    fake: Fake, tiny: Path, status: int, answers: dict, sentence: str
) -> None:
    fake.status, fake.answers = status, answers
    with pytest.raises(GblmError, match=sentence) as caught:
        score(fake.url, tiny)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"backend": "dense"}, "do not go with a server"),
        ({"dtype": "float32"}, "do not go with a server"),
        ({"protocols": (Protocol("pydoc", 257, 1),)}, "takes 256 tokens and one to generate"),
        ({"model": "http://user@x"}, "host, port and path only"),
        ({"model": "./x", "api_key": "y"}, "goes with the address of a server only"),
    ],
)
def test_what_does_not_go_with_a_server_is_refused(fake: Fake, more: dict, sentence: str) -> None:
    given = {"model": fake.url, "protocols": (Protocol("pydoc", 32, 1),)} | more
    with pytest.raises(UsageError, match=sentence):
        run_evaluation(Evaluation(**given))


def test_a_server_that_is_not_there_gets_one_sentence(fake: Fake) -> None:
    from gblm.evaluate.harness import ServedSubject

    url = fake.url
    fake.shutdown()
    fake.server_close()
    with pytest.raises(GblmError, match=r"MODEL cannot be reached at .*/v1/models: Connection"):
        ServedSubject(url)
