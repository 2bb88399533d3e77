"""Parts of a test that need a process of their own: limits, forks, signals that kill."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = ["ROOT", "Call", "apart", "apart_each"]

Call: TypeAlias = "tuple[Callable[..., object], Sequence[object]]"
"""A function of a module, and its arguments."""

ROOT = Path(__file__).resolve().parents[1]


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
    [result] = apart_each([(function, arguments)], timeout=timeout, environment=environment)
    return result


def apart_each(
    calls: Sequence[Call],
    *,
    timeout: float | None = 60,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Make each call in a process of its own, all of them forked from one.

    To import everything takes ten times as long as most of what is tried. See `apart`.
    """
    called = [(function.__module__, function.__name__, given) for function, given in calls]
    code = "import sys; from tests.processes import main; main(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(called, default=str)],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
    return [json.loads(line) for line in done.stdout.splitlines()]


def main(text: str) -> None:
    """Make calls, and print what they return, a line each."""
    calls = json.loads(text)
    for module, name, arguments in calls:
        function = getattr(importlib.import_module(module), name)
        if len(calls) == 1:  # a forked process has memory that is not all its own
            _call(function, arguments)
        pid = os.fork()
        if not pid:
            _call(function, arguments)
        _, status = os.waitpid(pid, 0)
        if status:
            raise SystemExit(f"{name}: status {status}")


def _call(function: Callable[..., object], arguments: Sequence[object]) -> None:
    try:
        print(json.dumps(function(*arguments)), flush=True)  # noqa: T201  # to the test
    except BaseException:  # noqa: BLE001  # the test shows it
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
