"""Break the package on purpose, one line at a time, and see whether the tests notice.

`make mutations`, or `python tests/mutations.py NAMES`, applies every mutation below to a copy of
the repository and runs the quick ones of the tests that ought to catch it. It ends with 1 if one
survives. An old text is looked for in the whole package and must stand there exactly once: whoever
rewrites such a line says here how to break the new one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ("toolkit", "export", "serve")
FAST = "not vllm and not real and not slow and not gpu"
SECONDS = 600


class Mutation(NamedTuple):
    """One text of the package and what replaces it; the tests' files are relative to tests/."""

    name: str
    old: str
    new: str
    tests: tuple[str, ...]


# By the tests that ought to fail: a name, the text as it is, and a wrong one.
LIST: dict[str, list[tuple[str, str, str]]] = {
    "test_patterns.py": [
        ("tie-break", "from_end <= missing[rows]", "from_end < missing[rows]"),
        ("tie-break-nm", "later = rows[i + 1 :] >= rows[i]",
         "later = rows[i + 1 :] > rows[i]"),
        ("halves-most", "HALVES = {(8, 16): 5}", "HALVES = {(8, 16): 6}"),
        ("halves-one-side", "(first > most) | (first < self.keep_n - most)", "(first > most)"),
        ("crowded", "if int(counts.max()) > most or", "if int(counts.max()) > most + 1 or"),
        ("scope", 'flat = score if scope == "row" else score.reshape(1, -1)',
         'flat = score if scope != "row" else score.reshape(1, -1)'),
    ],
    "methods/test_contract.py": [
        ("count", "keep_highest(flat, int(flat.shape[1] * self.sparsity)).reshape(score.shape)",
         "keep_highest(flat, round(flat.shape[1] * self.sparsity)).reshape(score.shape)"),
        ("wanda-score", 'return weight.float().abs() * stats["act_norm"]',
         'return weight.float() * stats["act_norm"]'),
    ],
    "methods/test_gblm.py": [
        ("alpha", "return total * (self.alpha / divisor)", "return total / divisor"),
        ("norm", 'samples if self.gradient_norm == "l1" else samples.sqrt()',
         'samples if self.gradient_norm == "l2" else samples.sqrt()'),
        ("half", ".clamp(max=limit).half().float()", ".clamp(max=limit)"),
    ],
    "calibrate/test_gradients.py": [
        ("l1-gradients", "sums[name] += gradient.abs_()", "sums[name] += gradient"),
        ("l2-root", "return total.sqrt_() if norm == L2 else total", "return total"),
    ],
    "calibrate/test_walk.py": [
        ("shrinkage", "hessian.mul_(1 - share)", "hessian.mul_(1 - share / 2)"),
    ],
    "calibrate/test_stats.py": [
        ("act-norm-root", "return self.mean.sqrt()", "return self.mean"),
        ("hessian-factor", "alpha=2 / total", "alpha=1 / total"),
        ("hessian-lower", "self.mean[stop:, start:stop] = self.mean[start:stop, stop:].t()",
         "pass"),
    ],
    "methods/test_sparsegpt.py methods/test_obs.py methods/test_refit.py": [
        ("damping", "add_(damping * matrix.diagonal().mean())", "add_(damping)"),
        ("dead-inputs", "    dead = hessian.diagonal() == 0\n    factor",
         "    dead = hessian.diagonal() < 0\n    factor"),
        ("obs-sign", "columns.addmm_(factor.t(), self.errors[start:low], alpha=-1)",
         "columns.addmm_(factor.t(), self.errors[start:low], alpha=1)"),
        ("obs-scales", "mse_scales(kept.t(), self.limit, pivots.squeeze(1).reciprocal())",
         "mse_scales(kept.t(), self.limit, pivots.squeeze(1))"),
        ("refit-mask", "residual = ((target - start) @ hessian).mul_(mask)",
         "residual = (target - start) @ hessian"),
    ],
    "test_values.py": [
        ("scale-reach", "return _stored(groups.abs().amax(dim=-1) / limit)",
         "return _stored(groups.amax(dim=-1).clamp(min=0) / limit)"),
        ("mse-choice", "torch.where(total < least, scales, best)",
         "torch.where(total > least, scales, best)"),
        ("mse-importance", "(error if importance is None else error.mul_(importance))", "error"),
        ("zero-scale", "torch.where(scales == 0, torch.ones_like(scales), scales)", "scales"),
        ("minus-zero", ".to(dtype).add_(0.0)", ".to(dtype)"),
    ],
    "formats/test_contract.py": [
        ("bit-order-read", 'np.unpackbits(bitmask.numpy(), axis=1, bitorder="little")',
         'np.unpackbits(bitmask.numpy(), axis=1, bitorder="big")'),
        ("bit-order-write", "(groups * weights).sum(dim=-1, dtype=torch.uint8)",
         "(groups.flip(-1) * weights).sum(dim=-1, dtype=torch.uint8)"),
        ("nibble-order", "nibbles[..., ::2] | nibbles[..., 1::2] << 4",
         "nibbles[..., 1::2] | nibbles[..., ::2] << 4"),
        ("rows-offsets", 'offsets[start : stop + 1] - offsets[start]', "offsets[start : stop + 1]"),
        ("join-offsets", "functional.pad(counts.cumsum(0), (1, 0))}",
         "functional.pad(counts.cumsum(0), (0, 1))}"),
    ],
    "formats/test_contract.py checkpoint/test_damage.py": [
        ("nm-counts", "most=exactly, least=exactly", "most=exactly, least=0"),
        ("truncated-tail", 'self._begins(offsets)[-1]) != len(parts["values"])',
         'self._begins(offsets)[-1]) < len(parts["values"])'),
        ("padding", "bool((self.padding(parts) != 0).any())",
         "bool((self.padding(parts) < 0).any())"),
        ("scale-check", "wrong = (~(scales.isfinite() & (scales > 0))).nonzero()",
         "wrong = (~(scales.isfinite() & (scales >= 0))).nonzero()"),
        ("nan-values", 'not all_finite(parts["values"])',
         'bool(parts["values"].isinf().any())'),
    ],
    "formats/test_manifest.py formats/test_contract.py": [
        ("manifest-version", 'if fields.get("version") != VERSION:', "if False:"),
        ("manifest-first", "first = min(first, next(globs, first))",
         "first = max(first, next(globs, first))"),
        ("manifest-target", "if not TARGET.fullmatch(target):", "if not TARGET.match(target):"),
        ("format-pattern", "if not FORMATS[name].holds(parsed):", "if False:"),
        ("halves-read", "first_wrong(mask, pattern.unit, pattern.unit_most)",
         "first_wrong(mask, pattern.unit, pattern.unit_most + 1)"),
    ],
    "test_resume.py": [
        ("resume-hash", 'if line["layer"] != index or line["sha256"] != sha256(path):',
         'if line["layer"] != index:'),
        ("resume-fingerprint", "if found.get(key) != wanted.get(key):", "if key not in found:"),
        ("resume-order", "self.finished = [layer for _, layer in intact]", "self.finished = []"),
    ],
    "test_ranks.py": [
        ("ranks-share", "return list(items[self.rank :: self.size])", "return list(items)"),
        ("ranks-mean", "weighted = mean * count", "weighted = mean"),
        ("ranks-device", 'if local is not None and device.startswith("cuda:"):', "if False:"),
    ],
    "test_prune.py export/test_pack.py": [
        ("packer-dtype", 'stored = weight.to(reader.headers[f"{name}.weight"][1])',
         "stored = weight"),
        ("packer-nan", "if not all_finite(stored.weight):", "if False:"),
        ("packer-room", "need = int(1.1 * sum(map(reader.num_bytes, reader)))", "need = int(0)"),
        ("shards", "self._pending_bytes + size > self.shard_bytes",
         "self._pending_bytes > self.shard_bytes"),
        ("overwrite", "if output.exists() and not overwrite:", "if False:"),
    ],
    "test_integer_runs.py": [
        ("bits", 'round(8 * size / count, 4)', 'round(4 * size / count, 4)'),
    ],
    "checkpoint/test_reader.py checkpoint/test_damage.py": [
        ("inside-name",
         'plain = Path(file).name == file and file not in ("", ".", "..")', "plain = True"),
        ("inside-link",
         'if target.parent != root / within and target.parent != root.parent.parent / "blobs":',
         "if False:"),
        ("auto-map", 'if "auto_map" in config:', "if False:"),
        ("pickles", "if any(folder.glob(\"*.safetensors\")):\n        return", "return"),
        ("promised", "expected is not None and (missing := expected - names)",
         "expected is None and (missing := names - names)"),
        ("unlisted", "if path.name not in self.files:", "if False:"),
        ("key-twice", "if len(found) < len(pairs):", "if False:"),
    ],
    "checkpoint/test_verify.py": [
        ("verify-hash", 'if not isinstance(facts, dict) or sha256(path) != facts.get("sha256"):',
         "if not isinstance(facts, dict):"),
        ("verify-against", 'if not same_bits(weight, dense.tensor(stored) + 0.0):',
         "if False:"),
    ],
    "test_head.py": [
        ("tied-stored", "done.add(packing.head.source)", "done.add(packing.head.name)"),
        ("head-nearest", "(self.rounding or self._to_the_nearest)", "self._to_the_nearest"),
        ("tied-expanded", "model.get_parameter(name).data = rows",
         "model.get_parameter(name).data = 0 * rows"),
    ],
    "kernels/test_experts.py": [
        ("experts-share", "* shares[tokens, places, None]", "* shares[tokens, 0, None]"),
        ("experts-gate", "silu(gate(rows).float()) * up(", "silu(up(rows).float()) * gate("),
        ("experts-nobody", "ids[ids >= 0].unique()", "ids.unique()"),
        ("experts-place", "stack([starts, sizes], 1)", "stack([starts, ends - starts], 1)"),
    ],
    "kernels/test_contract.py": [
        ("cpu-dtype", 'if dtype != torch.bfloat16:\n            return f"activations',
         'if dtype == torch.float64:\n            return f"activations'),
        ("cpu-columns", "if shape[1] % unit:\n            return f\"{shape[1]} columns",
         "if shape[1] % 8:\n            return f\"{shape[1]} columns"),
        ("forced", "for backend in [BACKENDS[forced]] if forced else BACKENDS.values():",
         "for backend in BACKENDS.values():"),
        ("row-blocks", "yield slice(start, min(start + step, shape[0]))",
         "yield slice(start, min(start + step, shape[0] - 1))"),
        ("dense-dtype", "return [fmt.expand(parts, dtype)]", "return [fmt.expand(parts)]"),
        ("row-starts", "        return byte_offsets(offsets.diff())\n    return offsets *",
         "        return offsets // 2\n    return offsets *"),
        ("op-shape", "return x.new_empty((*x.shape[:-1], shape[0]))",
         "return x.new_empty((*x.shape[:-1], shape[1]))"),
        ("preference", "        Dense(),\n        Reference(),",
         "        Reference(),\n        Dense(),"),
    ],
    "serve/test_access.py": [
        ("door", "if any(_is_for(door, name) and value.strip() not in harmless",
         "if any(name == door and value.strip() not in harmless"),
        ("rust-door", '"VLLM_USE_RUST_FRONTEND": ("", "0"),',
         '"VLLM_USE_RUST_FRONTEND": ("", "0", "1"),'),
        ("stranger", "if is_loopback(server.host):\n        return\n    if has_key:",
         "if True:\n        return\n    if has_key:"),
        ("elsewhere", "if is_short_for(name, word):", "if name == word:"),
    ],
    "serve/test_guard.py": [
        ("key-file", "return read_key(file) if file is not None else environment",
         "return environment"),
        ("open-route", "return [f\"/{route.removeprefix('/')}\" for route in routes]",
         "return [f\"/{route}\" for route in routes]"),
        ("bearer", 'return found and scheme.lower() == b"bearer"', "return found"),
        ("key-compare", "found |= hmac.compare_digest(given, known)", "found = given == known"),
        ("body-length", "int(length) > self.limit)", "int(length) > 2 * self.limit)"),
        ("body-chunks", 'message["type"] != "http.request" or self.seen <= self.limit',
         'message["type"] != "http.request" or self.seen >= 0'),
        ("no-key", "if not self.digests or not all(map(DIGEST.fullmatch, self.digests)):",
         "if not all(map(DIGEST.fullmatch, self.digests)):"),
        ("open-path", "(path in self.open or _is_preflight(scope))",
         "(path.startswith(tuple(self.open)) or _is_preflight(scope))"),
    ],
    "serve/test_versions.py serve/test_launch.py": [
        ("version", 'found.startswith(tuple(f"{tested}." for tested in TESTED_VERSIONS))',
         "found.startswith(TESTED_VERSIONS)"),
        ("core-spans", "if spans and core == spans[-1][1] + 1:", "if spans:"),
    ],
    "evaluate/test_gates.py": [
        ("gate-nan", "(math.isnan(pair[1]), sign * pair[1])", "sign * pair[1]"),
        ("gate-op", "passed = value <= gate.bound if at_most",
         "passed = value < gate.bound if at_most"),
        ("gate-points", "100 * (value - dense)", "(value - dense)"),
        ("gate-worst", "sign = 1 if at_most else -1", "sign = 1"),
    ],
    "evaluate/test_perplexity.py evaluate/test_engines.py evaluate/test_eval.py": [
        ("ppl-mean", "return of_loss(-float(logprobs.double().mean()))",
         "return of_loss(-float(logprobs.double().median()))"),
        ("drift-sign", "(model.logprobs - dense.logprobs).abs()",
         "(model.logprobs - dense.logprobs)"),
        ("kl-direction", "(theirs.exp() * (theirs - model.full)).sum(-1).cpu()",
         "(model.full.exp() * (model.full - theirs)).sum(-1).cpu()"),
    ],
    "bench/test_watch.py": [
        ("watch-better", '(METRICS[name].better == "less")', '(METRICS[name].better == "more")'),
        ("watch-pairs", "counted = [all(map(metric.below, pair)) for pair in pairs]",
         "counted = [True for pair in pairs]"),
    ],
    "bench/test_validity.py bench/test_noise.py": [
        ("failed-requests", "if seen.failed or done != load.num_prompts:", "if seen.failed:"),
        ("alike", "        if value != told[0][1]:", "        if False:"),
        ("cached", "seen.cached is not None and seen.cached > CACHED", "seen.cached == 1"),
        ("guests", 'for key in after if not key.startswith("guest")', "for key in after"),
    ],
    "test_record.py": [
        ("paired", "tuple(a / b for a, b in zip(ours.rounds, theirs.rounds, strict=True))",
         "tuple(b / a for a, b in zip(ours.rounds, theirs.rounds, strict=True))"),
        ("interval", "if below > (1 - CONFIDENCE) / 2:", "if below > 1 - CONFIDENCE:"),
    ],
    "export/test_onnx.py": [
        ("onnx-weights", ' < math.inf and not wrong,', ' < math.inf,'),
        ("onnx-arithmetic", 'worst <= allowed < math.inf and not wrong', 'not wrong'),
        ("onnx-infinite", ' < math.inf and', ' and'),
        ("onnx-nan", 'return found if found == found else float("inf")', "return found"),
    ],
}  # fmt: skip
MUTATIONS = [
    Mutation(name, old, new, tuple(files.split()))
    for files, own in LIST.items()
    for name, old, new in own
]


class Broken(Exception):
    """The list does not fit the package any more."""


@cache
def sources(root: Path) -> dict[Path, str]:
    """The package's files and their texts."""
    files = [path for folder in PACKAGE for path in sorted((root / folder).rglob("*.py"))]
    return {path: path.read_text() for path in files}


def find(mutation: Mutation, root: Path = ROOT) -> Path:
    """The one file of the package that holds the old text, relative to `root`."""
    counts = {path: text.count(mutation.old) for path, text in sources(root).items()}
    found = [path for path, count in counts.items() if count]
    if sum(counts.values()) != 1:
        places = ", ".join(str(path.relative_to(root)) for path in found) or "nowhere"
        raise Broken(f"{mutation.name}: {mutation.old!r} stands {sum(counts.values())}× ({places})")
    for name in mutation.tests:
        if not (root / "tests" / name).is_file():
            raise Broken(f"{mutation.name}: tests/{name} is not there")
    return found[0].relative_to(root)


def copy(to: Path) -> Path:
    """What the tests need of the repository, as a folder of its own that can be broken."""
    ignored = shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info")
    shutil.copytree(ROOT, to, ignore=ignored, symlinks=True)
    package = to / "build" / "path" / "gblm"
    package.mkdir(parents=True)
    for path in [*(to / "toolkit").iterdir(), to / "export", to / "serve"]:
        (package / path.name).symlink_to(path)
    return to


def run_tests(root: Path, files: tuple[str, ...], seconds: int = SECONDS) -> tuple[int, str]:
    """pytest's exit code, 124 where it does not end in time, and its output."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    paths = [f"tests/{name}" for name in files]
    environment = {**os.environ, "PYTHONPATH": str(root / "build" / "path")}
    try:
        done = subprocess.run(
            [*command, "-m", FAST, *paths], cwd=root, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=seconds, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return 124, f"no end after {seconds} s"
    return done.returncode, done.stdout


def attempt(mutation: Mutation, root: Path) -> str:
    """Break the copy, run the tests, mend it; how it ended: caught, SURVIVED or broken."""
    path = root / find(mutation, root)
    text = path.read_text()
    path.write_text(text.replace(mutation.old, mutation.new))
    try:
        code, output = run_tests(root, mutation.tests)
    finally:
        path.write_text(text)
    failed = [line for line in output.splitlines() if line.startswith("FAILED")]
    if code == 1 and failed:
        return "caught by " + failed[0].removeprefix("FAILED ").split(" - ")[0]
    return "SURVIVED" if code == 0 else f"broken: pytest ended with {code}\n{output[-2000:]}"


def main() -> int:
    """0 if every mutation was caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="of mutations; all if none")
    asked = parser.parse_args()
    known = [mutation.name for mutation in MUTATIONS]
    if unknown := set(asked.names) - set(known):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    chosen = [m for m in MUTATIONS if not asked.names or m.name in asked.names]
    for mutation in chosen:
        find(mutation)
    caught = 0
    with tempfile.TemporaryDirectory(prefix="gblm-mutations-") as folder:
        root = copy(Path(folder) / "copy")
        files = tuple(sorted({name for mutation in chosen for name in mutation.tests}))
        code, output = run_tests(root, files, 10 * SECONDS)
        if code:
            raise Broken(f"the tests fail without any mutation:\n{output[-4000:]}")
        for mutation in chosen:
            began = time.monotonic()
            ended = attempt(mutation, root)
            caught += ended.startswith("caught")
            print(f"{mutation.name:20} {time.monotonic() - began:5.1f} s  {ended}", flush=True)
    print(f"{caught} of {len(chosen)} mutations were caught")
    return int(caught < len(chosen))


if __name__ == "__main__":
    sys.exit(main())
