"""Parts of a test that need a process of their own: limits, forks, signals that kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["ROOT", "apart"]

ROOT = Path(__file__).resolve().parents[1]
_CALL = """
import importlib, json, sys
module, name, *arguments = sys.argv[1:]
print(json.dumps(getattr(importlib.import_module(module), name)(*map(json.loads, arguments))))
"""


def apart(
    function: Callable[..., object],
    *arguments: object,
    timeout: float | None = 60,
    environment: Mapping[str, str] | None = None,
) -> Any:  # noqa: ANN401  # whatever it is
    """Call a function of a module in a process of its own, and return what it returns there.

    A process that dies, or takes too long, is a failure.

    Args:
        function: What to call.
        arguments: For it; they, and the result, go by way of JSON.
        timeout: Seconds.
        environment: Variables besides those of this process.
    """
    texts = [json.dumps(argument, default=str) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-c", _CALL, function.__module__, function.__name__, *texts],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])
