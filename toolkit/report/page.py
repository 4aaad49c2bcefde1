"""One self-contained HTML page: no scripts, nothing loaded, text from files escaped."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from gblm import __version__
from gblm.report import figures
from gblm.report.folders import PackedFacts
from gblm.report.sources import Origin, Sources
from gblm.report.tables import linear_rows, measured, overall, tables


def html(sources: Sources, title: str) -> str:
    """The page.

    Args:
        sources: what it shows.
        title: of the page.
    """
    template = files("gblm.report").joinpath("page.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    facts = sources.facts
    return environment.from_string(template).render(
        version=__version__,
        title=title,
        origins=sources.origins,
        invalid=facts.invalid,
        notes=facts.notes,
        tables=list(tables(facts)),
        quality_figures=[*figures.quality(facts), *figures.quality_and_speed(facts)],
        speed_tables=list(measured(facts)),
        speed_figures=[*figures.speeds(facts), *figures.curves(facts)],
        folders=[_folder(folder) for folder in sources.folders],
        layers=list(figures.layers(sources.folders)),
        masks=list(figures.masks(sources.folders)),
        **repeat(sources),
    ) + "\n"  # fmt: skip


def repeat(sources: Sources) -> dict[str, Any]:
    """Commands, what has none, and the environments, each once."""
    commands = [origin.command for origin in sources.origins if origin.command]
    commands += [
        f"gblm prune MODEL --recipe {folder.name}/recipe.json --output {folder.name}"
        for folder in sources.folders
        if folder.recipe
    ]
    unrecorded = [origin.file for origin in sources.origins if not origin.command]
    unrecorded += [folder.name for folder in sources.folders if not folder.recipe]
    environments: list[dict[str, str]] = []
    for origin in sources.origins:
        found = _environment(origin)
        alike = next((e for e in environments if e | {"of": ""} == found | {"of": ""}), None)
        if alike is not None:
            alike["of"] += f", {found['of']}"
        elif found:
            environments.append(found)
    return {
        "commands": list(dict.fromkeys(commands)),
        "unrecorded": list(dict.fromkeys(unrecorded)),
        "environments": environments,
    }


def _environment(origin: Origin) -> dict[str, str]:
    """What the record says of its machine and versions, as text."""
    known = origin.provenance
    machine, packages = known.get("machine"), known.get("packages")
    found = {"of": origin.file}
    if isinstance(machine, dict):
        found["machine"] = ", ".join(f"{key} {value}" for key, value in machine.items())
    if isinstance(packages, dict):
        found["packages"] = ", ".join(f"{key} {value}" for key, value in packages.items())
    for key in ("device", "python", "gblm", "commit"):
        if known.get(key):
            found[key] = str(known[key])
    return found


def _folder(folder: PackedFacts) -> dict[str, Any]:
    facts = folder.facts
    backends = ", ".join(f"{count} on {name}" for name, count in folder.backends.items())
    method = folder.recipe.get("method")
    return {
        "name": folder.name,
        "line": f"{facts['architecture']}, {len(folder.linears)} packed linears ({backends}), "
        f"{overall(folder)}, {facts['bytes'] / 1e6:.1f} MB, "
        f"{facts['size_ratio']:.3f} of dense"
        + (f"; pruned with {method}." if isinstance(method, str) else "."),
        "linears": linear_rows(folder),
    }
