"""Text for calibration and evaluation, as seeded windows of tokens.

Sources: a .txt, .jsonl (field "text") or .parquet (column "text") file, a named set, or `pydoc`:
the English documentation that every CPython carries, which needs no network. It differs a little
between Python versions; records therefore carry the hash of the tokens.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from gblm.errors import InputError, MachineError, UsageError

Split = Literal["calibration", "held-out"]
# A document is drawn until one is long enough, as in the papers' C4 loader; this bounds the search.
MAX_DRAWS = 100_000


def read_documents(source: str, split: Split) -> list[str]:
    """Read a source.

    Args:
        source: a path or a name of NAMED_SETS.
        split: which part of a named set; a file is always read whole.

    Returns:
        The documents. A .txt file, wikitext2 and pydoc are one document each.

    Raises:
        InputError: the file is missing, empty or malformed.
        UsageError: the name is unknown.
        MachineError: a package or the network is missing.
    """
    if source in NAMED_SETS:
        return NAMED_SETS[source](split)
    path = Path(source)
    if path.suffix not in READERS:
        raise UsageError(
            f"text source {source!r} is neither a .txt, .jsonl or .parquet file "
            f"nor one of {', '.join(NAMED_SETS)}."
        )
    if not path.is_file():
        raise InputError(f"text file {source} does not exist.")
    documents = READERS[path.suffix](path)
    if not any(documents):
        raise InputError(f"text file {source} holds no text.")
    return documents


def calibration_windows(
    documents: list[str],
    tokenizer: Any,
    num_samples: int,
    seq_len: int,
    seed: int,
    bos: bool = True,
) -> Tensor:
    """Draw windows at random, exactly as the papers' loaders do.

    With one document, a start is drawn per sample. With several, documents are drawn until one is
    longer than the window, then a start in it (GBLM-Pruner lib/data.py).

    Args:
        documents: the text.
        tokenizer: of the model.
        num_samples: how many windows are drawn.
        seq_len: tokens per window.
        seed: of the draw.
        bos: each window begins with `start_tokens`, as a server's prompts do; the papers' code
            leaves them out.

    Returns:
        [num_samples, seq_len] int64.

    Raises:
        InputError: no document is longer than `seq_len` tokens.
    """
    rng = random.Random(seed)  # noqa: S311 (sampling text, not secrets)
    first = start_tokens(tokenizer) if bos else []
    seq_len -= len(first)
    encoded: dict[int, list[int]] = {}
    windows: list[list[int]] = []
    draws = 0
    while len(windows) < num_samples:
        pick = 0 if len(documents) == 1 else rng.randint(0, len(documents) - 1)
        if pick not in encoded:
            encoded[pick] = encode(tokenizer, documents[pick])
        ids = encoded[pick]
        draws += 1
        if len(ids) > seq_len:
            start = rng.randint(0, len(ids) - seq_len - 1)
            windows.append(first + ids[start : start + seq_len])
        elif _hopeless(encoded, len(documents), draws, seq_len):
            raise InputError(
                f"calibration text: no document is longer than {seq_len} tokens (the longest "
                f"has {max(map(len, encoded.values()))}). Lower --seq-len or give more text."
            )
    return torch.tensor(windows, dtype=torch.int64)


def _hopeless(encoded: dict[int, list[int]], num_documents: int, draws: int, seq_len: int) -> bool:
    """Tell whether drawing on would find no document longer than the window."""
    searched = len(encoded) == num_documents or draws >= MAX_DRAWS
    return searched and not any(len(ids) > seq_len for ids in encoded.values())


def evaluation_windows(
    documents: list[str],
    tokenizer: Any,
    seq_len: int,
    max_windows: int | None = None,
    bos: bool = True,
) -> Tensor:
    """Cut the text, joined by blank lines, into windows; the tail is dropped.

    Args:
        documents: the text.
        tokenizer: of the model.
        seq_len: tokens per window.
        max_windows: the first so many; all if None.
        bos: each window begins with `start_tokens`, as a server's prompts do; the papers' code
            leaves them out.

    Returns:
        [num_windows, seq_len] int64.
    """
    ids = encode(tokenizer, "\n\n".join(documents))
    first = torch.tensor(start_tokens(tokenizer) if bos else [], dtype=torch.int64)
    seq_len -= len(first)
    count = len(ids) // seq_len
    if count == 0:
        raise InputError(
            f"evaluation text has {len(ids)} tokens, fewer than one window of {seq_len}."
        )
    count = min(count, max_windows or count)
    windows = torch.tensor(ids, dtype=torch.int64).unfold(0, seq_len, seq_len)
    return torch.cat([first.expand(count, -1), windows[:count]], dim=1)


def start_tokens(tokenizer: Any) -> list[int]:
    """Find what the tokenizer puts before a prompt: one <bos> for Gemma, nothing for SmolLM2.

    Models that were trained with them lose their footing without: Gemma 3 270M has a perplexity of
    143 instead of 56 on WikiText-2.
    """
    text = encode(tokenizer, "1")
    whole: list[int] = tokenizer("1", add_special_tokens=True, verbose=False)["input_ids"]
    found = next(i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    return whole[:found]


def encode(tokenizer: Any, text: str) -> list[int]:
    """Turn a text into token ids without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def fingerprint(windows: Tensor) -> str:
    """Hash token ids, so that two records can be known to rest on the same text."""
    return hashlib.sha256(windows.to(torch.int64).numpy().tobytes()).hexdigest()


def _pydoc(split: Split) -> list[str]:
    from pydoc_data import topics

    parts: dict[Split, list[str]] = {"calibration": [], "held-out": []}
    seen = held_out = 0
    for name in sorted(topics.topics):
        text = topics.topics[name]
        seen += len(text)
        # Whole topics, a fifth of the text, spread over the alphabet.
        part: Split = "held-out" if held_out + len(text) <= seen / 5 else "calibration"
        held_out += len(text) if part == "held-out" else 0
        parts[part].append(text)
    calibration, held = ("\n\n".join(parts[p]) for p in ("calibration", "held-out"))
    if split == "calibration":
        return [calibration]
    # Topics quote each other; a paragraph that was calibrated on may not be measured on.
    known = set(calibration.split("\n\n"))
    return ["\n\n".join(p for p in held.split("\n\n") if p not in known)]


def _wikitext2(split: Split) -> list[str]:
    part = "train" if split == "calibration" else "test"
    rows = _hub_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=part)
    # The papers join training lines by a space and test lines by a blank line.
    return [(" " if split == "calibration" else "\n\n").join(rows["text"])]


def _c4(split: Split) -> list[str]:
    part, shard = (
        ("train", "00000-of-01024") if split == "calibration" else ("validation", "00000-of-00008")
    )
    name = f"en/c4-{part}.{shard}.json.gz"
    rows = _hub_dataset("allenai/c4", data_files={part: name}, split=part)
    return list(rows["text"] if split == "calibration" else rows["text"][:1100])


def _hub_dataset(*args: str, **kwargs: Any) -> Any:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MachineError(
            f"text set {args[0]} needs the `datasets` package: pip install 'gblm-toolkit[eval]'."
        ) from error
    try:
        return load_dataset(*args, **kwargs)
    except Exception as error:
        raise MachineError(
            f"text set {args[0]} could not be loaded ({type(error).__name__}: {error}). "
            "Offline, use the default `pydoc` or a file of your own."
        ) from error


def _read_txt(path: Path) -> list[str]:
    return [_read_utf8(path)]


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"text file {path} is not UTF-8: {error}") from error
    except OSError as error:
        raise InputError(f"text file {path} cannot be read: {error}") from error


def _read_jsonl(path: Path) -> list[str]:
    documents = []
    # Not splitlines(): JSON strings may hold other line separators unescaped.
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            text = json.loads(line)["text"]
            text.encode()  # no half of a surrogate pair
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f'{path} line {number}: not a JSON object with a "text" string.'
            ) from error
        documents.append(text)
    return documents


def _read_parquet(path: Path) -> list[str]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MachineError(f"{path}: reading parquet needs `pip install pyarrow`.") from error
    try:
        column = pyarrow.parquet.read_table(path, columns=["text"])["text"]
    except (pyarrow.ArrowException, KeyError, OSError) as error:
        raise InputError(f'{path}: no readable parquet column "text": {error}') from error
    return [str(value) for value in column.to_pylist() if value]


NAMED_SETS: dict[str, Callable[[Split], list[str]]] = {
    "pydoc": _pydoc,
    "wikitext2": _wikitext2,
    "c4": _c4,
}
READERS: dict[str, Callable[[Path], list[str]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
}
