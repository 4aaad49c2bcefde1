"""One recovery: from a packed folder and its dense model to a better packed folder."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from gblm import data
from gblm.calibrate.parts import Part, SparsePart, Train, Vector, sparse_part
from gblm.calibrate.ranks import Ranks, rank_device, ranks_from_environment
from gblm.calibrate.text import parse_mix
from gblm.checkpoint.pack import write_side_files
from gblm.checkpoint.report import summary, weight_row
from gblm.checkpoint.resume import open_work, remove_leftovers, work_path
from gblm.checkpoint.write import ShardWriter, check_output, folder_bytes, new_folder
from gblm.errors import CheckpointError, InputError, UsageError
from gblm.files import read_json, write_json
from gblm.model import experts
from gblm.model.folder import ModelFolder
from gblm.model.loading import (
    check_device,
    fast_dtype,
    load,
    load_tokenizer,
    model_config,
    rename_as_in_memory,
)
from gblm.model.packed_reader import (
    MANIFEST_FILE,
    RECIPE_FILE,
    REPORT_FILE,
    PackedLinear,
    PackedReader,
)
from gblm.model.reader import Reader
from gblm.packed import check_loadable
from gblm.progress import Progress, no_progress
from gblm.provenance import computing_versions
from gblm.recipe import SHARD_SIZE, Calibration, Recovering, read_recipe, shard_bytes
from gblm.recover.needs import Extent, settle
from gblm.recover.teacher import Head, Hidden, compare
from gblm.recover.texts import TRAINING, read_texts
from gblm.recover.train import Trainer, batches, seconds_per_token

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A recovery whose inputs have been opened and checked, but nothing computed yet."""

    packed: PackedReader
    recipe: dict[str, Any]
    dense: ModelFolder
    how: Recovering
    device: str
    ranks: Ranks

    @property
    def dtype(self) -> torch.dtype:
        """Name the dtype that both models compute in."""
        return fast_dtype(self.packed.dtype, self.device)

    @property
    def before(self) -> Calibration | None:
        """Give the text that pruning read; None if it read nothing."""
        text = self.recipe.get("calibration")
        return Calibration.from_dict(text) if text else None

    @property
    def head_name(self) -> str | None:
        """Name the output head if it is packed; it is frozen then, like the dense model's."""
        return next((n for n in self.packed.linears if n.rpartition(".")[2] == "lm_head"), None)

    @property
    def trained(self) -> list[str]:
        """Name the packed linears that are trained."""
        return [name for name in self.packed.linears if name != self.head_name]

    def fingerprint(self) -> dict[str, Any]:
        """Give the facts that must be equal for an unfinished run to go on."""
        with Reader(self.dense) as dense:
            dense_sha256 = dense.sha256()
        return {
            "recover": self.how.model_dump(mode="json"),
            "packed_sha256": self.packed.sha256(),
            "dense_sha256": dense_sha256,
            "versions": computing_versions(),
            "dtype": str(self.dtype),
            "threads": torch.get_num_threads(),
            "ranks": self.ranks.size,
        }


def recover(
    packed: str | Path,
    output: str | Path,
    how: Recovering,
    dense: str | Path | None = None,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    resume: bool = True,
    progress: Progress = no_progress,
    ranks: Ranks | None = None,
) -> dict[str, Any]:
    """Train a packed model towards its dense self and write it packed, with the same masks.

    Under torchrun all ranks call this and share each batch; rank 0 writes.

    Args:
        packed: a packed folder, as `gblm prune` writes it.
        output: the folder to make.
        how: what is trained, on which text, for how long.
        dense: the dense model; the one that `packed` was made from if None.
        device: a torch device.
        overwrite: replace an existing folder.
        resume: go on after the last saved step of the same command.
        progress: for progress bars.
        ranks: the processes that share each batch; those that torchrun started if None.

    Returns:
        "before" and "after", by text: see `gblm.recover.teacher.compare`; "kept", whether the
        folder holds the trained weights or, because KL did not fall, those it started from;
        "losses", KL in nats before each step; "tokens", "seconds", "output". Empty on other ranks
        than 0.

    Raises:
        GblmError: an input is refused, or training diverges; nothing is left under the output's
            name.
    """
    began, target = time.monotonic(), Path(output)
    device = rank_device(device)
    check_device(device)
    source = ModelFolder.open(packed)
    check_loadable(source)
    joined: AbstractContextManager[Ranks]
    joined = ranks_from_environment(device) if ranks is None else nullcontext(ranks)
    with joined as ranks, PackedReader(source) as reader:
        rename_as_in_memory(reader)
        recipe = read_recipe(source.path / RECIPE_FILE)
        task = Task(reader, recipe, _dense_folder(source, recipe, dense), how, device, ranks)
        task = replace(task, how=_check(task, target, overwrite))
        work: AbstractContextManager[Any] = nullcontext()
        if ranks.leads:
            facts = task.fingerprint()
            _check_origin(task, facts["dense_sha256"], given=dense is not None)
            work = open_work(target, facts, resume)
        with work:
            ranks.agree(0)  # the others wait for the folder
            found = _Run(task, work_path(target), progress).execute()
            report = _write(task, found, target, overwrite) if ranks.leads else {}
    return report | {"seconds": round(time.monotonic() - began, 1)} if report else {}


@dataclass
class _Found:
    """What training left."""

    parts: Mapping[str, Part]
    before: dict[str, dict[str, float]]
    after: dict[str, dict[str, float]]
    losses: list[float]
    tokens_sha256: str
    tokens: int

    @property
    def better(self) -> bool:
        """Tell whether the mean KL over the held-out texts fell."""
        return _mean_kl(self.after) < _mean_kl(self.before)


class _Run:
    """The dense model once through all texts, then the pruned one in its place."""

    def __init__(self, task: Task, work: Path, progress: Progress) -> None:
        self.task, self.work, self.progress = task, work, progress
        self.tokenizer = load_tokenizer(task.dense)

    def execute(self) -> _Found:
        """Take the teacher's states, then train, measuring before and after."""
        task, how = self.task, self.task.how
        tokens = self._tokens()
        texts = read_texts(how, task.before, task.dense.path, self.tokenizer, tokens)
        model: Any = load(task.dense, task.dtype, task.device)
        experts.unfuse(model, every=task.ranks.size > 1)
        dense_head = Head(model)
        dense_head.check(model, texts[TRAINING])
        hidden = self._teach(model, texts)
        parts = become(model, task)
        trainer = Trainer(model, parts, how, task.ranks)
        # Rank 0 measures: the others read no state after the last step, when it removes them.
        held_out = [name for name in texts if name != TRAINING and task.ranks.leads]

        def measured() -> dict[str, dict[str, float]]:
            if held_out:
                logger.info("KL to the dense model is measured on %s", " and ".join(held_out))
            return {
                name: compare(model, texts[name], hidden[name], trainer.head, dense_head)
                for name in held_out
            }

        before, windows = measured(), texts[TRAINING]
        steps = len(batches(how, len(windows)))
        logger.info("%d steps of training begin", steps)
        told = self._told(steps, windows.shape[1])
        trainer.run(windows, hidden[TRAINING], dense_head, self.work, told)
        after = measured()
        if after and not math.isfinite(_mean_kl(after)):
            raise InputError(
                f"recovery diverged at step {steps} (KL {_mean_kl(after)}): lower --learning-rate."
            )
        return _Found(
            parts, before, after, trainer.losses, data.fingerprint(windows),
            steps * how.batch_size * windows.shape[1],
        )  # fmt: skip

    def _tokens(self) -> int:
        """Give the tokens to train on; those of a time are estimated once, and kept."""
        how, kept = self.task.how, self.work / "tokens.json"
        if how.minutes is None:
            return how.tokens
        if self.task.ranks.leads and not kept.exists():
            model: Any = load(self.task.dense, self.task.dtype, self.task.device)
            each = seconds_per_token(model, how.batch_size, how.seq_len)
            tokens = int(60 * how.minutes * self.task.ranks.size / each)
            write_json(kept, {"tokens": min(how.tokens, tokens)})
        self.task.ranks.agree(0)  # the others wait for the file
        tokens = int(read_json(kept)["tokens"])
        logger.info("%g minutes: about %d tokens", how.minutes, tokens)
        return tokens

    def _teach(self, model: Any, texts: Mapping[str, Tensor]) -> dict[str, Hidden]:
        # Other text under the same name is read anew.
        found = {
            name: Hidden(self.work / f"teacher-{data.fingerprint(windows)[:16]}")
            for name, windows in texts.items()
        }
        step = self.progress("the dense model reads", sum(map(len, texts.values())))
        for name, windows in texts.items():
            found[name].folder.mkdir(exist_ok=True)
            if self.task.ranks.leads:
                found[name].fill(model, windows, step)
        self.task.ranks.agree(0)  # the others wait for the files
        return found

    def _told(self, steps: int, seq_len: int) -> Callable[[int, float], None]:
        """Give what is called after each step: a line for the first, then one every 15 seconds."""
        tokens = self.task.how.batch_size * seq_len
        logged, since = time.monotonic(), 0

        def told(number: int, loss: float) -> None:
            nonlocal logged, since
            since += tokens
            spent = time.monotonic() - logged
            if spent < 15 and 1 < number < steps:
                return
            rate, logged, since = since / spent, time.monotonic(), 0
            logger.info(
                "step %d of %d: KL %.3f nats, %.0f tokens/s, %.0f s left",
                number, steps, loss, rate, (steps - number) * tokens / rate,
            )  # fmt: skip

        return told


def become(model: Any, task: Task) -> dict[str, Part]:
    """Turn the loaded dense model into the pruned one and return the parts that train it.

    The dense model is no longer there afterwards, but for its embeddings and its head.
    """
    parts: dict[str, Part] = {}
    packed, device = task.packed, task.device
    for name in task.trained:
        weight = packed.linears[name].fmt.unpack(packed.parts(name)).to(task.dtype, device)
        part = sparse_part(weight, cast(Train, task.how.train))
        parts[f"{name}.weight"] = part
        model.get_parameter(f"{name}.weight").data.copy_(part.give())
    if task.head_name is not None:
        head = model.get_output_embeddings()
        frozen = packed.weight(task.head_name).to(device, head.weight.dtype)
        head.weight = nn.Parameter(frozen, requires_grad=False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in packed.tied:
        parameters[name].data = head.weight.data  # not in place: the dense head looks at the old
    for name in packed.dense_names():
        if (tensor := parameters.get(name)) is None:
            continue  # a buffer that transformers computes, though old checkpoints store it
        tensor.data.copy_(packed.tensor(name))
        if tensor.ndim == 1:
            parts[name] = Vector(tensor)
    return parts


def _dense_folder(
    packed: ModelFolder, recipe: Mapping[str, Any], given: str | Path | None
) -> ModelFolder:
    if recipe.get("recover"):
        raise InputError(f"{packed} was recovered already: start from the folder it was made from.")
    if given:
        return ModelFolder.open(given)
    if (named := recipe.get("model")) is None:
        raise UsageError(f"{packed} names no dense model: give --baseline.")
    if (place := packed.place_of(named)).is_dir():
        return ModelFolder.open(place)
    if "/" not in named:
        raise UsageError(f"{packed} was made from {named}, which is not here: give --baseline.")
    return ModelFolder.open(named)


def _check(task: Task, output: Path, overwrite: bool) -> Recovering:
    """Refuse what cannot go well, and decide what is trained."""
    packed, ranks = task.packed, task.ranks
    read_json(packed.folder.path / REPORT_FILE)  # needed at the end
    if task.how.batch_size < ranks.size:
        raise UsageError(f"{ranks.size} ranks cannot share {task.how.batch_size} windows a step.")
    linears = [packed.linears[name] for name in task.trained]
    shapes, kept = [linear.shape for linear in linears], sum(map(_kept, linears))
    config = model_config(packed.folder).get_text_config()
    extent = Extent(config, shapes, kept, _check_teacher(task), task.dtype)
    how = settle(task.how, extent, task.device)
    if ranks.leads:
        for text in parse_mix(how.text).keys() & set(how.held_out):
            if Path(text).is_file():  # named sets have a held-out part
                logger.warning("%s is trained on, too: its KL tells nothing of other text", text)
        remove_leftovers(output)
        need = extent.disk(how) - folder_bytes(work_path(output))
        check_output(output, overwrite, need, packed.folder.path, task.dense.path)
    return how


def _check_teacher(task: Task) -> int:
    """Refuse a dense model that is not the packed one's; gives the number of its weights."""
    packed = task.packed
    task.dense.check_dense()
    with Reader(task.dense) as dense:
        rename_as_in_memory(dense)
        wanted: dict[str, tuple[int, ...]]
        wanted = {f"{name}.weight": linear.shape for name, linear in packed.linears.items()}
        wanted |= {name: packed.linears[head].shape for name, head in packed.tied.items()}
        wanted |= {name: packed.headers[name][0] for name in packed.dense_names()}
        for name, shape in wanted.items():
            found = dense.headers[name][0] if name in dense else None
            if found != tuple(shape) and not (name == f"{task.head_name}.weight" and found is None):
                raise InputError(
                    f"{task.dense} is not the dense model of {packed.folder}: its {name} is "
                    f"{'missing' if found is None else list(found)}, not {list(shape)}."
                )
        return sum(math.prod(shape) for shape, _ in dense.headers.values())


def _check_origin(task: Task, dense_sha256: str, given: bool) -> None:
    """Refuse a dense model with other files than the packed one was made from, unless it was given.

    Folders that `gblm prune` did not make name no origin.
    """
    made_from = read_json(task.packed.folder.path / MANIFEST_FILE).get("model_sha256")
    if made_from in (None, dense_sha256):
        return
    found = f"{task.dense} is not as it was when {task.packed.folder} was made from it"
    if not given:
        raise InputError(f"{found}: --baseline {task.dense} trains towards it all the same.")
    logger.warning("%s, or another model: it is trained towards all the same", found)


def _kept(linear: PackedLinear) -> int:
    """Count the values of a linear, codes of less than 8 bits at most."""
    return linear.fmt.values.count(math.prod(linear.headers["values"][0]))


def _mean_kl(texts: Mapping[str, Mapping[str, float]]) -> float:
    return sum(text["kl"] for text in texts.values()) / len(texts)


def _write(task: Task, found: _Found, output: Path, overwrite: bool) -> dict[str, Any]:
    """Write the packed folder: trained weights if they are better, else the start's."""
    packed, parts = task.packed, found.parts if found.better else {}
    source = packed.folder.path
    old = read_json(source / REPORT_FILE)
    rows = {row["name"]: row for row in old["tensors"]}
    if not found.better:
        logger.warning(
            "KL to the dense model did not fall: the folder keeps the weights as they were"
        )
    recipe = task.recipe | {"recover": task.how.model_dump(mode="json")}
    size = shard_bytes(recipe.get("max_shard_size", SHARD_SIZE))
    with new_folder(output, overwrite) as folder:
        shards = ShardWriter(folder, size)
        for name, tensors, row in _pieces(task, parts, rows):
            rows[name] = row
            for tensor_name, tensor in tensors.items():
                shards.add(tensor_name, tensor)
        for name in packed.dense_names():
            part, tensor = parts.get(name), packed.tensor(name)
            stored = tensor if part is None else part.give().to("cpu", tensor.dtype)
            shards.add(packed.stored_name(name), stored)
        if task.head_name is not None:
            for local, tensor in packed.parts(task.head_name).items():
                shards.add(f"{task.head_name}.{local}", tensor)
        shards.finish()
        report = summary(
            list(rows.values()), old.get("head"), old["bytes_dense"], shards.total_bytes
        )
        result = {
            "before": found.before, "after": found.after, "kept": found.better,
            "losses": found.losses, "tokens": found.tokens, "tokens_sha256": found.tokens_sha256,
        }  # fmt: skip
        report |= {"recover": result}
        notes = read_json(source / MANIFEST_FILE)
        notes = {key: notes[key] for key in notes if key not in ("schema", "provenance", "files")}
        write_side_files(folder, packed.folder, packed.folder.config, recipe, report, notes)
    return result | {"output": str(output)}


def _pieces(
    task: Task, parts: Mapping[str, Part], rows: Mapping[str, dict[str, Any]]
) -> Iterable[tuple[str, dict[str, Tensor], dict[str, Any]]]:
    """Each pruned linear's packed tensors by full name, and its row of the sparsity report."""
    for name in task.trained:
        linear, part = task.packed.linears[name], parts.get(f"{name}.weight")
        if not isinstance(part, SparsePart):
            tensors, row = task.packed.parts(name), rows[name]
        else:
            stored = linear.headers["values"][1]
            dtype = stored if linear.fmt.values.is_float else task.packed.dtype
            weight = part.result(dtype).to(dtype)
            if not bool(weight.weight.isfinite().all()):
                raise CheckpointError(f"{name}: training left NaN or Inf; lower --learning-rate.")
            tensors = linear.fmt.pack(name, weight)
            row = weight_row(name, linear.fmt, linear.shape, dtype, weight.zeros, tensors)
        yield name, {f"{name}.{local}": tensor for local, tensor in tensors.items()}, row
