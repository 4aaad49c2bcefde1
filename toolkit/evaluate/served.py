"""A model behind a running vLLM server, scored by the log-probs of prompts.

vLLM gives those of the prompt's own tokens and of the likeliest ones, not of all tokens. The server
is not trusted: sizes, types and ranges of what it answers are checked.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import time
from pathlib import Path
from typing import Any

from torch import Tensor

from gblm.errors import DAMAGE, GblmError, InputError, MachineError, UsageError
from gblm.evaluate.subjects import TOP, Scores, Subject
from gblm.network import (
    KEY_VARIABLE,
    exchange,
    is_loopback,
    read_key,
    split_address,
    warn_of_plain_key,
)

SECONDS = 600.0
# 32 000 tokens with 20 likeliest ones each are some 40 MB.
MAX_BYTES = 64 * 2**20


def is_address(model: str) -> bool:
    """Whether a model is named by the address of its server."""
    return model.startswith(("http://", "https://"))


class ServedSubject(Subject):
    """One model of a running server.

    Attributes:
        url: of the server.
        name: of the model there: the first that it lists.
        folder: that the server loaded it from, if that is a folder on this machine.
        max_tokens: of a window; None where the server does not say.
    """

    engine = "vLLM server"
    dtype = "dtype of the server"

    def __init__(self, url: str, key_file: Path | None = None) -> None:
        """Ask the server what it serves.

        Args:
            url: its address, with or without /v1.
            key_file: holds the API key; else the environment's, as of `gblm serve`.

        Raises:
            UsageError: the address is none.
            InputError: the key cannot be read, or the answer is not that of an OpenAI server.
            MachineError: there is no answer, or it is not 200.
        """
        parts = split_address("MODEL", url)
        path = parts.path.rstrip("/").removesuffix("/v1")
        self.url = f"{parts.scheme}://{parts.netloc}{path}"
        self._key = read_key(key_file) if key_file else os.environ.get(KEY_VARIABLE) or None
        if self._key is not None:
            if not self._key.isascii() or not self._key.isprintable():
                raise InputError("the API key must be one line of ASCII text.")
            warn_of_plain_key("MODEL", parts)
        card = _first_model(self._ask("/v1/models"), self.url)
        self.name: str = card["id"]
        self.folder = _folder(card.get("root")) if is_loopback(parts.hostname or "") else None
        longest = card.get("max_model_len")
        # One token is generated, because vLLM refuses to generate none.
        self.max_tokens = longest - 1 if isinstance(longest, int) else None

    def score(self, window: Tensor) -> Scores:
        """Score a window [seq_len] int64."""
        if self.max_tokens is not None and len(window) > self.max_tokens:
            raise UsageError(
                f"{self.url} takes {self.max_tokens} tokens and one to generate, not "
                f"{len(window)}: lower --seq-len."
            )
        tokens: list[int] = window.tolist()
        found = self._ask(
            "/v1/completions",
            {"model": self.name, "prompt": tokens, "max_tokens": 1, "temperature": 0,
             "prompt_logprobs": TOP},
        )  # fmt: skip
        return Scores.likeliest(*_rows(found, tokens, self.url))

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON that one request is answered with."""
        data, began = None if body is None else json.dumps(body).encode(), time.monotonic()
        try:
            status, answer = exchange(self.url + path, self._key, began + SECONDS, MAX_BYTES, data)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            raise MachineError(f"{self.url}{path} cannot be reached: {reason}.") from error
        if status != 200:
            raise _refusal(self.url + path, status)
        if len(answer) > MAX_BYTES:
            raise InputError(f"{self.url}{path} answers with more than {MAX_BYTES >> 20} MiB.")
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{self.url}{path} does not answer with JSON.") from error


def _refusal(url: str, status: int) -> GblmError:
    if status in (401, 403):
        hint = f"give the API key with --api-key-file, or in {KEY_VARIABLE}"
    elif status == 400:
        hint = (
            f"is the text in the model's vocabulary, and may a request ask for {TOP} log-probs "
            "(vLLM's --max-logprobs)?"
        )
    elif 300 <= status < 400:
        hint = "redirects are not followed: give the final address"
    else:
        hint = "is this the address of a vLLM server?"
    return MachineError(f"{url} answers HTTP {status}; {hint}.")


def _first_model(answer: Any, url: str) -> dict[str, Any]:
    try:
        card: dict[str, Any] = answer["data"][0]
        if isinstance(card["id"], str):
            return card
    except (IndexError, KeyError, TypeError):
        pass
    raise InputError(f"{url}/v1/models names no model: is this the address of a vLLM server?")


def _folder(root: Any) -> Path | None:
    """The folder that a server of this machine says it loaded, if it is a model's."""
    if not isinstance(root, str) or not root.startswith("/"):
        return None
    return Path(root) if (Path(root) / "config.json").is_file() else None


def _rows(answer: Any, tokens: list[int], url: str) -> tuple[list[float], list[dict[int, float]]]:
    """Log-probs of the tokens but the first, and of the TOP likeliest ones at each place."""
    try:
        steps = answer["choices"][0]["prompt_logprobs"]
        if len(steps) != len(tokens):
            raise ValueError("not one entry for each token")
        own, best = [], []
        for token, step in zip(tokens[1:], steps[1:], strict=True):
            own.append(_finite(step[str(token)]["logprob"]))
            ranked = sorted((one["rank"], int(number), _finite(one["logprob"]))
                            for number, one in step.items())[:TOP]  # fmt: skip
            best.append({number: logprob for _, number, logprob in ranked})
    except DAMAGE as error:
        raise InputError(
            f"{url}/v1/completions gives no prompt_logprobs as vLLM does: only vLLM's servers can "
            "be scored."
        ) from error
    return own, best


def _finite(value: Any) -> float:
    if isinstance(value, bool) or not math.isfinite(value) or value > 1e-3:
        raise ValueError("no log-prob")
    return float(value)
