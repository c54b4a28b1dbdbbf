"""`python -m jaxserve.server.fastchat_worker`: the same as `jaxserve fastchat-worker`, under the name that FastChat's users expect."""

from __future__ import annotations

import importlib
import sys

if __name__ == "__main__":
    cli = importlib.import_module("jaxserve.cli")  # by name: the command line stands above this package
    sys.exit(cli.main(["fastchat-worker", *sys.argv[1:]]))
