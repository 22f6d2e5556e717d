"""The command ``tracin``: parses, calls, prints and writes files. Everything it tells comes from the library."""

from tracin.cli.main import main

__all__ = ["main"]
