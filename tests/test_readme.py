"""The README says what is: its numbers stand in the records, its commands run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tables
from conftest import Outcome

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("page", "name", "text"), tables.blocks(), ids=lambda v: str(v)[-20:])
def test_tables_are_those_of_the_records(page: Path, name: str, text: str) -> None:
    assert f"<!-- {name}: begin -->\n{text}\n<!-- {name}: end -->" in page.read_text()


def lines(page: str, part: str) -> list[str]:
    """The gblm commands of a part of a page, comments cut."""
    text = (ROOT / page).read_text().split(part)[1].split("```")[1]
    return [line.split("#")[0].strip() for line in text.splitlines() if line.startswith("gblm ")]


def ran(gblm: Callable[..., Outcome], commands: list[str]) -> list[str]:
    """Run commands in order; of those that need vLLM or the network only the help is asked for."""
    names = []
    for line in commands:
        words = shlex.split(line)[1:]
        if words[0] in ("fetch", "serve", "bench"):
            assert gblm(words[0], "--help").code == 0
            continue
        if words[0] == "eval":
            words += ["--dtype", "float32"]
        done = gblm(*words)
        assert done.code == 0, (line, done)
        names.append(words[0])
    return names


def test_the_readmes_commands_run_on_a_tiny_model(
    gblm: Callable[..., Outcome], tiny: Path, tmp_path: Path
) -> None:
    """They are copied from the page; a tiny model stands in for the reader's."""
    (tmp_path / "my-llama").symlink_to(tiny)
    assert ran(gblm, lines("README.md", "## Four commands")[-4:]) == ["prune", "eval"]


def test_the_readmes_python_runs_on_a_tiny_model(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my-llama").symlink_to(tiny)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(README.split("```python")[1].split("```")[0], names)
    assert names["model"].config.vocab_size == 258


def test_the_tours_commands_run_on_a_tiny_model(
    gblm: Callable[..., Outcome], tiny: Path, tmp_path: Path
) -> None:
    """They are copied in order; a tiny model stands in for the fetched one."""
    (tmp_path / "smollm2").symlink_to(tiny)
    assert ran(gblm, lines("docs/tour.md", "# Tour")) == [
        "prune", "prune", "inspect", "inspect", "eval", "recover", "prune", "search",
        "report", "export", "export", "export", "doctor",
    ]  # fmt: skip


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target
