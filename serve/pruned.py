"""`gblm serve --prune`: a dense model is pruned into the cache once, and served from there."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from pathlib import Path

from gblm import __version__
from gblm.cache import cache_folder
from gblm.checkpoint.reader import Reader
from gblm.checkpoint.writer import SIDE_FILES, folder_sha256
from gblm.errors import UsageError
from gblm.folder import model_name, resolve
from gblm.model import refuse_packed
from gblm.patterns import parse
from gblm.progress import Progress, no_progress
from gblm.provenance import versions
from gblm.prune import prune
from gblm.recipe import Recipe
from gblm.steps import steps_of

logger = logging.getLogger(__name__)


def recipe_of(model: str | Path, words: str) -> Recipe:
    """The recipe of "METHOD PATTERN"; everything else is the default of `gblm prune`.

    Raises:
        UsageError: these are not two words, or the method is unknown.
        PatternError: the pattern is unknown.
    """
    parts = words.split()
    if len(parts) != 2:
        raise UsageError(f'--prune {words!r}: give a method and a pattern, such as "gblm 2:4".')
    method, pattern = parts
    recipe = Recipe(model=str(model), method=method, pattern=str(parse(pattern)))
    steps_of(recipe)
    return recipe


def pruned_folder(model: str | Path, words: str, progress: Progress = no_progress) -> Path:
    """The packed folder in the cache; made now, if an earlier start has not made it.

    Args:
        model: a dense HF folder or a hub id.
        words: "METHOD PATTERN".
        progress: for progress bars.

    Raises:
        GblmError: whatever `gblm prune` refuses; the cache holds complete folders only.
    """
    recipe = recipe_of(model, words)
    source = resolve(model)
    refuse_packed(source)
    folder = _place(recipe, source)
    if folder.exists():
        logger.info("using the model pruned earlier: %s", folder)
        return folder
    logger.info("pruning %s with %s into %s", model, words, folder)
    prune(recipe, folder, progress)
    return folder


def _place(recipe: Recipe, source: Path) -> Path:
    """A folder of the cache whose name changes with whatever could change its content."""
    side = {file.name for pattern in SIDE_FILES for file in source.glob(pattern) if file.is_file()}
    with Reader(source) as reader:
        content = folder_sha256(source, {"config.json", *reader.files, *side})
    facts = {
        "recipe": recipe.model_dump(mode="json", exclude={"model"}),
        "model": content,
        "versions": {"gblm": __version__}
        | {name: versions()[name] for name in ("torch", "transformers")},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    title = f"{model_name(recipe.model)}-{recipe.method}-{recipe.pattern}"
    return cache_folder() / "pruned" / f"{re.sub(r'[^A-Za-z0-9._-]+', '_', title)}-{digest}"
