"""The list of mutations fits the package; `make mutations` runs it."""

from __future__ import annotations

from pathlib import Path

import mutations
import pytest

SMALL = mutations.Mutation("small", "return not value", "return value", ("test_it.py",))


def test_every_old_text_stands_once_and_every_test_is_there() -> None:
    for one in mutations.MUTATIONS:
        mutations.find(one)
    assert len({one.name for one in mutations.MUTATIONS}) == len(mutations.MUTATIONS)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository of one function, with a test of it."""
    for name in ("toolkit", "export", "serve", "tests"):
        (tmp_path / name).mkdir()
    (tmp_path / "toolkit" / "it.py").write_text("def no(value):\n    return not value\n")
    (tmp_path / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\npythonpath = ["toolkit"]\n'
    )
    return tmp_path


@pytest.mark.parametrize(
    ("test", "ended"),
    [
        ("from it import no\ndef test_no():\n    assert no(False)\n", "caught by tests/test_it"),
        ("from it import no\ndef test_no():\n    no(False)\n", "SURVIVED"),
        ("import nothing_of_this_name\n", "broken: pytest ended with 2"),
    ],
)
def test_a_mutation_is_caught_or_survives(tree: Path, test: str, ended: str) -> None:
    (tree / "tests" / "test_it.py").write_text(test)
    assert mutations.attempt(SMALL, tree).startswith(ended)
    assert "return not value" in (tree / "toolkit" / "it.py").read_text()


def test_a_text_that_is_gone_or_stands_twice_is_named(tree: Path) -> None:
    (tree / "tests" / "test_it.py").touch()
    (tree / "serve" / "other.py").write_text("return not value\n")
    with pytest.raises(mutations.Broken, match=r"small: .* stands 2× .*it.py, serve/other.py"):
        mutations.find(SMALL, tree)
    with pytest.raises(mutations.Broken, match=r"stands 0× \(nowhere\)"):
        mutations.find(SMALL._replace(old="return 1"), tree)
    with pytest.raises(mutations.Broken, match=r"tests/test_no\.py is not there"):
        mutations.find(SMALL._replace(old="def no", tests=("test_no.py",)), tree)
