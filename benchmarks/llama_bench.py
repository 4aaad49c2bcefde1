"""ik_llama.cpp as a rival: its llama-bench is a side of `gblm bench`, started for each load.

The weights are repacked at run time (`-rtr 1`), and it warms up before it counts. One sequence at a
time; a decode starts from an empty context.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import psutil

from gblm.bench.requests import Load, Request, Seen
from gblm.bench.sides import Setup, Side


class LlamaBench(Side):
    """A GGUF file in llama-bench."""

    def __init__(self, name: str, program: Path, model: Path, setup: Setup) -> None:
        """Take the program beside what every side has."""
        super().__init__(name, "llama-bench", model, setup)
        self.program = program

    def start(self) -> None:
        """Do nothing: each load is a process."""

    def load(self, load: Load) -> Seen:
        """Run the load's tokens after the first, or of one token its prompt."""
        steps = load.output_len - 1
        asked = {
            "-m": self.path, "-t": self.setup.threads, "-p": 0 if steps else load.prompt_len,
            "-n": steps, "-r": load.num_prompts, "-rtr": 1, "-o": "json",
        }  # fmt: skip
        words = [str(word) for pair in asked.items() for word in pair]
        done = subprocess.run([self.program, *words], stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, check=True)  # fmt: skip
        (found,) = json.loads(done.stdout)
        took = [ns / 1e9 for ns in found["samples_ns"]]
        starts = [sum(took[:number]) for number in range(len(took))]
        requests = [
            Request(start, seconds, load.prompt_len, load.output_len, 0.0 if steps else seconds,
                    (seconds / steps,) * steps if steps else ())
            for start, seconds in zip(starts, took, strict=True)
        ]  # fmt: skip
        return Seen(requests, sum(took), prompts="llama-bench:")

    def stop(self) -> None:
        """Do nothing: no process is left."""

    @property
    def process(self) -> psutil.Process:
        """Give this process, whose children are counted."""
        return psutil.Process()
