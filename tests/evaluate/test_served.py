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
from gblm.evaluate.served import ServedSubject
from gblm.evaluate.subjects import TOP, Subject, open_subject
from gblm.model import load_tokenizer


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
        assert asked["model"] == "served"
        scores = self.subject.score(torch.tensor(asked["prompt"]))
        steps: list[dict | None] = [None]
        for row, token in zip(scores.full, asked["prompt"][1:], strict=True):
            order = row.argsort(descending=True).tolist()
            shown = order[: asked["prompt_logprobs"]]
            # As vLLM: the prompt's own token comes first, whatever its rank.
            steps.append({
                str(t): {"logprob": float(row[t]), "rank": order.index(t) + 1, "decoded_token": "x"}
                for t in dict.fromkeys([token, *shown])
            })  # fmt: skip
        choice = {"text": "", "prompt_logprobs": steps}
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
    return open_subject(pack_tiny(), dtype="float32")


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
    protocol = Protocol(str(text_file), 32, 2, stride=16)
    found = run_evaluation(Evaluation(f"{fake.url}/v1/", (protocol,)))
    (row,) = found["texts"]
    assert (found["model"], found["server"]) == ("served", fake.url)
    # The folder that the server names is here, and so are its recipe and size.
    assert (found["baseline"], found["baseline_note"]) == (str(tiny), "named by recipe.json")
    assert found["size"]["bits per weight"] < 16
    assert f"vLLM server, KL over the likeliest {TOP} tokens and the rest" in row["protocol"]
    assert row["protocol_baseline"].endswith("bfloat16, torch")

    dense, tokenizer = open_subject(tiny), load_tokenizer(tiny)
    losses, kls, whole, same = [], [], [], []
    for number, window in enumerate(protocol.windows(tokenizer)):
        ours, theirs = fake.subject.score(window), dense.score(window)
        for place in range(15 if number else 0, 31):
            q, p = ours.full[place].double().exp(), theirs.full[place].double().exp()
            losses.append(-math.log(q[window[place + 1]]))
            same.append(int(q.argmax()) == int(p.argmax()))
            top = q.argsort(descending=True)[:TOP]
            parts = [(p[t], q[t]) for t in top] + [(1 - p[top].sum(), 1 - q[top].sum())]
            kls.append(sum(float(a * (a / b).log()) for a, b in parts))
            whole.append(float((p * (p / q).log()).sum()))
    assert row["tokens"] == len(losses) == 31 + 16
    assert row["perplexity"] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert row["drift"]["kl_mean"] == pytest.approx(sum(kls) / len(kls), rel=1e-3)
    assert row["drift"]["kl_mean"] < sum(whole) / len(whole)
    assert row["drift"]["top1"] == pytest.approx(sum(same) / len(same))
    # A KL over some tokens is too small to hold a bound against.
    with pytest.raises(InputError, match="has no such figure"):
        judge([parse_gate("kl <= 100")], found)
    (verdict,) = judge([parse_gate("top1 >= 0")], found)
    assert verdict.passed


def test_a_server_elsewhere_needs_a_tokenizer(fake: Fake, tiny: Path, text_file: Path) -> None:
    fake.root = "someone/model"
    asked = (fake.url, (Protocol(str(text_file), 32, 1),))
    with pytest.raises(UsageError, match="give --baseline or --tokenizer"):
        run_evaluation(Evaluation(*asked))
    found = run_evaluation(Evaluation(*asked, tokenizer=str(tiny)))
    assert found["baseline_note"] == "the server does not run on this machine; give --baseline"
    assert (found["size"], "KL" in found["protocol"]) == (None, False)
    assert found["perplexity"] > 1


def test_the_key_comes_from_a_file_or_the_environment(
    fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ServedSubject(fake.url)
    monkeypatch.setenv("VLLM_API_KEY", "of-the-environment")
    ServedSubject(fake.url)
    (tmp_path / "key").write_text("of-a-file\n")
    ServedSubject(fake.url, tmp_path / "key")
    assert fake.keys == [None, "Bearer of-the-environment", "Bearer of-a-file"]
    (tmp_path / "key").write_text("two\nlines")
    with pytest.raises(InputError, match="one line of ASCII"):
        ServedSubject(fake.url, tmp_path / "key")


STEP = {"1": {"logprob": -0.5, "rank": 1}}


@pytest.mark.parametrize(
    ("status", "answers", "sentence"),
    [
        (401, {}, "HTTP 401; give the API key with --api-key-file, or in VLLM_API_KEY"),
        (302, {}, "redirects are not followed"),
        (404, {}, "is this the address of a vLLM server"),
        (200, {"models": {"data": []}}, "names no model"),
        (200, {"models": {"data": [{"id": 7}]}}, "names no model"),
        (200, {"models": b"<html>"}, "does not answer with JSON"),
        (200, {"completion": {"choices": [{"text": "a"}]}}, "gives no prompt_logprobs"),
        (200, {"completion": {"choices": [{"prompt_logprobs": [None]}]}}, "no prompt_logprobs"),
        (200, {"completion": {"choices": [{"prompt_logprobs": [None, {"2": STEP["1"]}]}]}},
         "no prompt_logprobs"),
        (200, {"completion": {"choices": [{"prompt_logprobs": [
            None, {"1": {"logprob": "nan", "rank": 1}}]}]}}, "no prompt_logprobs"),
        (200, {"completion": {"choices": [{"prompt_logprobs": [
            None, {"1": {"logprob": 0.5, "rank": 1}}]}]}}, "no prompt_logprobs"),
    ],
)  # fmt: skip
def test_what_a_server_answers_is_not_believed(
    fake: Fake, status: int, answers: dict, sentence: str
) -> None:
    fake.status, fake.answers = status, answers
    with pytest.raises(GblmError, match=sentence) as caught:
        ServedSubject(fake.url).score(torch.tensor([0, 1]))
    assert "\n" not in str(caught.value)


def test_a_token_that_the_baseline_lacks_is_refused(fake: Fake, text_file: Path) -> None:
    step = {"1": {"logprob": -0.5, "rank": 2}, "999": {"logprob": -0.1, "rank": 1}}
    tokens = load_tokenizer(Path(fake.root))(text_file.read_text()[:8])["input_ids"][:2]
    steps = [None, {str(tokens[1]): step["1"], "999": step["999"]}]
    fake.answers = {"completion": {"choices": [{"prompt_logprobs": steps}]}}
    with pytest.raises(InputError, match="a token 999 and the baseline 258 tokens"):
        run_evaluation(Evaluation(fake.url, (Protocol(str(text_file), 2, 1),)))


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ({"engine": "onnx"}, "servers run vLLM"),
        ({"backend": "dense"}, "do not go with a server"),
        ({"protocols": (Protocol("pydoc", 32, 1, "float32"),)}, "do not go with a server"),
        ({"protocols": (Protocol("pydoc", 257, 1),)}, "takes 256 tokens and one to generate"),
        ({"model": "http://user@x"}, "host, port and path only"),
        ({"model": "./x", "tokenizer": "y"}, "go with the address of a server only"),
    ],
)
def test_what_does_not_go_with_a_server_is_refused(fake: Fake, more: dict, sentence: str) -> None:
    given = {"model": fake.url, "protocols": (Protocol("pydoc", 32, 1),)} | more
    with pytest.raises(UsageError, match=sentence):
        run_evaluation(Evaluation(**given))


def test_a_server_that_is_not_there_gets_one_sentence(fake: Fake) -> None:
    url = fake.url
    fake.shutdown()
    fake.server_close()
    with pytest.raises(GblmError, match=r"/v1/models cannot be reached"):
        ServedSubject(url)
