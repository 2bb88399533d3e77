"""The command line: `asyncloader`, or `python -m asyncloader`."""

from ._app import main, run

__all__ = ["main", "run"]
