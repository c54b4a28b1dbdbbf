"""`jaxserve bench NAME`: each benchmark is a file of this folder, and is found by that.

A file's docstring begins with what it measures, which is its help text. It has `add_arguments(parser)` and `run(args)`, and imports
what is slow to import in `run` only, since the parser of every command reads it.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import pkgutil
from typing import Any


def add_bench(commands: Any) -> None:
    """Adds the command, with a command below it for each file."""
    text = "measure a part of jaxserve on this machine"
    parser: argparse.ArgumentParser = commands.add_parser("bench", help=text, description=text[0].upper() + text[1:] + ".")
    benchmarks = parser.add_subparsers(required=True, metavar="NAME")
    for found in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{found.name}")
        description = inspect.getdoc(module) or ""
        one = benchmarks.add_parser(
            found.name.replace("_", "-"),
            help=description.split("\n")[0],
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(one)
        one.set_defaults(run=module.run)
