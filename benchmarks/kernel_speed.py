"""Record the kernels' speed for docs/kernels.md on this machine. Takes about five minutes.

    python benchmarks/kernel_speed.py [--rounds N]

For one and for two threads: a square LLaMA-7B weight with up to 256 tokens, then other shapes; with
one thread the lesser instruction sets, too. Writes benchmarks/results/kernels-CPU.json and the
tables. Run it while nothing else runs.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import older
import tables
from pages import RESULTS, made_by

from gblm.kernels import native
from gblm.record import Record

MAIN = "--shapes 4096x4096 --tokens 1,2,4,8,16,64,256"
LESSER = "--shapes 4096x4096 --tokens 1,4,16 --no-vllm"


def main() -> None:
    """Run the command several times and join its records."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, help="in every run, for a quick trial")
    rounds, began = parser.parse_args().rounds, time.monotonic()
    runs = [measure(line + (f" --rounds {rounds}" if rounds else "")) for line in lines()]
    facts = runs[0]["kernels"]
    cpu = f"{runs[0]['provenance']['machine']['cpu']} {facts['cpu_model']}".lower()
    path = RESULTS / f"kernels-{re.sub(r'[^a-z0-9]+', '-', cpu).strip('-')}.json"
    record = {
        "kind": "kernels",
        "command": made_by(),
        "provenance": runs[0]["provenance"],
        "runs": runs,
    }
    path.write_text(json.dumps(shortened(record), ensure_ascii=False) + "\n", encoding="utf-8")
    tables.main()
    print(f"{time.monotonic() - began:.0f} s; record: {path}")


def lines() -> list[str]:
    """Arguments of all runs."""
    best = native.instruction_set()
    others = [name for name in ("avx512", "avx2") if name != best and has(name)]
    native.use_instruction_set(best)
    return [
        f"--threads 1 {MAIN}",
        *(f"--threads 1 --isa {name} {LESSER}" for name in others),
        f"--threads 2 {MAIN}",
    ]  # fmt: skip


def has(name: str) -> bool:
    """Whether this CPU has an instruction set."""
    try:
        native.use_instruction_set(name)
    except native.KernelError:
        return False
    return True


def measure(arguments: str) -> dict[str, Any]:
    """Print and run one command; its record."""
    print(f"\n$ gblm bench kernels {arguments}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        command = [sys.executable, "-m", "gblm", "bench", "kernels", *arguments.split()]
        subprocess.run([*command, "--output", str(file)], check=True)
        return older.kernels(Record.read(file))


def shortened(value: Any) -> Any:
    """Five digits of every number that was measured."""
    if isinstance(value, dict):
        return {key: shortened(each) for key, each in value.items()}
    if isinstance(value, list):
        return [shortened(each) for each in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
