"""The queries of deploy/: of the Grafana dashboard and of the alert rules."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
DASHBOARD = DEPLOY / "grafana" / "dashboards" / "gblm.json"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
VARIABLES = {"$model": ".*", "$instance": ".*", "$__rate_interval": "2m"}
# Everything in a query that is no name of a metric: labels, strings, windows, lists of labels.
OTHER = re.compile(
    r"""\{[^}]*\}|"[^"]*"|\[[^]]*\]|\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)"""
)
WORD = re.compile(r"[a-zA-Z_:][\w:]*(?!\w*\s*\()")
OPERATORS = {"and", "or", "unless", "bool", "offset"}


def metrics(query: str) -> set[str]:
    """The metrics that a query reads."""
    return {*WORD.findall(OTHER.sub(" ", query))} - OPERATORS


def of_alerts() -> list[str]:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    return [rule["expr"] for rule in group["rules"]]


def of_panels() -> list[str]:
    """With Grafana's variables filled in."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [_filled(one["expr"]) for panel in panels for one in panel.get("targets", [])]


def of_variables() -> list[str]:
    """What the lists above the dashboard are made of."""
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    queries = [one["query"]["query"] for one in variables if one["type"] == "query"]
    return [_filled(re.sub(r"^label_values\((.*), \w+\)$", r"\1", query)) for query in queries]


def documents(path: Path) -> Iterator[dict[str, Any]]:
    """The YAML documents of a file."""
    yield from yaml.safe_load_all(path.read_text())


def _filled(query: str) -> str:
    for name, value in VARIABLES.items():
        query = query.replace(name, value)
    assert "$" not in query
    return query
