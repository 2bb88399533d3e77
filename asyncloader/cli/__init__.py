"""The command line: `asyncloader`, or `python -m asyncloader`."""

from ._app import main

__all__ = ["main"]
