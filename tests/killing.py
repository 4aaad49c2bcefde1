"""Run `prune` in a child process that kills itself at a chosen step on the way to the disk."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from command_line import CONTEXT


def killed_run(recipe: dict[str, Any], output: Path, step: int) -> int:
    """Exit code of a run that is killed at its `step`-th write, fsync or rename; 0: it finished."""
    return _ended(_run, recipe, output, step)


def killed_recovery(start: Path, output: Path, how: dict[str, Any], step: int) -> int:
    """Exit code of a recovery that is killed at a training step; its state is saved at each."""
    return _ended(_recover, start, output, how, step)


def _ended(target: Callable[..., None], *args: object) -> int:
    child = CONTEXT.Process(target=_start, args=(dict(os.environ), target, *args))
    child.start()
    child.join(timeout=120)
    code = child.exitcode
    child.kill()
    if code is None:
        raise TimeoutError("the run hangs")
    return code


def _start(environment: dict[str, str], target: Callable[..., None], *args: object) -> None:
    # The fork server has the environment of the test that started it.
    os.environ.update(environment)
    target(*args)


def _run(recipe: dict[str, Any], output: Path, step: int) -> None:
    import safetensors.torch

    from gblm.checkpoint import write
    from gblm.prune import prune
    from gblm.recipe import Recipe

    left = [step]
    for name in ("fsync", "replace", "rename"):
        setattr(os, name, dying(left, getattr(os, name), lambda *args: None))
    for module in (safetensors.torch, write):
        module.save_file = dying(left, module.save_file, _half_a_file)
    prune(Recipe.from_dict(recipe), output)


def _recover(start: Path, output: Path, how: dict[str, Any], step: int) -> None:
    from gblm.recipe import Recovering
    from gblm.recover import run, train

    real = train.Trainer._step

    def step_or_die(self: train.Trainer, *args: Any) -> float:
        if len(self.losses) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, *args)

    train.SAVE_SECONDS = 0.0
    train.Trainer._step = step_or_die  # type: ignore[method-assign]
    run.recover(start, output, Recovering.model_validate(how))


def dying(left: list[int], real: Callable[..., Any], last: Callable[..., None]) -> Any:
    """`real`, until the call at which `left` runs out: that one is `last`, and then SIGKILL."""

    def call(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            last(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    return call


def _half_a_file(tensors: object, path: str | Path, *rest: object) -> None:
    Path(path).write_bytes(b"\x20\0\0\0\0\0\0\0{")
