"""Writes docs/reference.md: every option, route and metric, from the code. `make docs`; tests/test_docs.py compares."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.metrics_core import Metric

from jaxserve.cli import make_parser
from jaxserve.server.app import create_app
from jaxserve.server.config import ServerConfig
from jaxserve.server.metrics import EngineMetrics
from tests.server.fake_engine import FakeEngine

PATH = Path(__file__).parent.parent / "docs" / "reference.md"
HEAD = """# Reference

Every option, route and metric. `make docs` writes this page from the code; what they are for is in [serving.md](serving.md).
"""


def reference() -> str:
    """The page."""
    parts = [HEAD, "## Commands\n", *_commands(), "## Routes\n", *_routes(), "## Metrics\n", *_metrics()]
    return "\n".join(parts)


def _commands() -> Iterator[str]:
    """The first command with a group of options shows it, the others name it."""
    seen: dict[str, str] = {}
    for name, parser in _parsers(make_parser(), ""):
        yield f"### jaxserve {name}\n\n{parser.description}\n"
        again = []
        for group in parser._action_groups:
            rows = [_row(action) for action in group._group_actions if action.help and action.dest != "help"]
            table = "\n".join(rows)
            if not rows:
                continue
            if table in seen and group.title not in ("options", "positional arguments"):
                again.append(f"{group.title} (see {seen[table]})")
                continue
            seen.setdefault(table, name)
            yield f"| {group.title} | |\n|---|---|\n{table}\n"
        if again:
            yield f"Further groups: {', '.join(again)}.\n"


def _parsers(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """(name, parser) of every command that can be run."""
    below = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    if not below:
        yield name, parser
    for choices in below:
        for word, sub in choices.choices.items():
            yield from _parsers(sub, f"{name} {word}".strip())


def _row(action: argparse.Action) -> str:
    flags = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"
    choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
    text = str(action.help).replace("%%", "%").replace("|", "\\|")
    return f"| {flags} | {text}{choices} |"


def _routes() -> Iterator[str]:
    yield "| route | |\n|---|---|"
    for path, methods in create_app(FakeEngine(), ServerConfig(profile="folder")).openapi()["paths"].items():
        for method, route in methods.items():
            yield f"| `{method.upper()} {path}` | {route['description']} |"
    yield ""


def _collected() -> Iterator[Metric]:
    metrics = EngineMetrics("m")
    metrics.set_cache_config(FakeEngine().config)
    for registry in (metrics.registry, metrics.http_registry):
        yield from registry.collect()


def _metrics() -> Iterator[str]:
    yield "| metric | type | |\n|---|---|---|"
    for metric in _collected():
        name = metric.name + ("_total" if metric.type == "counter" else "")
        yield f"| `{name}` | {metric.type} | {metric.documentation} |"
    yield ""


if __name__ == "__main__":
    PATH.write_text(reference(), encoding="utf-8")
