"""The README says what is: its numbers stand in the records, its commands run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import tables
from conftest import Outcome

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("page", "name", "text"), tables.blocks(), ids=lambda v: str(v)[-20:])
def test_tables_are_those_of_the_records(page: Path, name: str, text: str) -> None:
    assert f"<!-- {name}: begin -->\n{text}\n<!-- {name}: end -->" in page.read_text()


def test_every_file_of_the_tree_exists() -> None:
    tree = README.split("## The tree")[1].split("```")[1]
    folder = ""
    for line in tree.strip().splitlines():
        names = re.match(r"\s*((?:[\w.]+/?\s{1,2})+)", line)
        assert names, line
        if not line.startswith(" "):
            folder = names[1].split()[0]
            assert (ROOT / folder).is_dir(), line
            continue
        for name in names[1].split():
            if "." in name or name.endswith("/"):
                assert (ROOT / folder / name).exists(), f"{folder}{name}"


def commands() -> list[str]:
    """The gblm commands of the tour, continuation lines joined, comments cut."""
    blocks = README.split("## Five minutes")[1].split("```")[1::2]
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.startswith("gblm ")]


def test_the_tours_commands_run_on_a_tiny_model(
    gblm: Callable[..., Outcome], tiny: Path, tmp_path: Path
) -> None:
    """Copied from the page in order; a tiny model stands in for the fetched one."""
    (tmp_path / "smollm2").symlink_to(tiny)
    ran = []
    for line in commands():
        words = shlex.split(line)[1:]
        if words[0] in ("fetch", "serve", "bench"):
            assert gblm(words[0], "--help").code == 0
            continue
        if words[0] == "eval":
            words += ["--dtype", "float32"]
        done = gblm(*words)
        assert done.code == 0, (line, done)
        ran.append(words[0])
    assert ran == [
        "prune", "prune", "inspect", "inspect", "eval", "prune", "prune", "search", "search",
        "report", "export", "export", "export", "doctor",
    ]  # fmt: skip


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_links_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(target).exists(), target
