"""What a command's exit code says when it fails, and what programs can read of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from asyncloader.cli import run
from tests.oracle import write_checkpoint
from tests.processes import apart
from tests.support import data

if TYPE_CHECKING:
    from pathlib import Path

COMMANDS = {
    "inspect": ["PATH"],
    "show": ["PATH", "t"],
    "load": ["PATH"],
    "verify": ["PATH"],
    "diff": ["PATH", "PATH"],
    "convert": ["PATH", "PATH.safetensors"],
}


def call_with_a_bug(arguments: list[str]) -> int:
    """Run a command where torch cannot be asked for a dtype: nothing works then."""
    import torch  # noqa: PLC0415  # of the process that this runs in

    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("broken installation")

    for name in ("frombuffer", "empty", "zeros", "from_numpy"):
        setattr(torch, name, broken)
    return run(arguments)


@pytest.mark.parametrize("command", ["load", "diff"])
def test_a_bug_has_the_code_of_a_failure_and_not_of_a_no(tmp_path: Path, command: str) -> None:
    write_checkpoint(tmp_path, {"t": data([1, 2])}, {})
    arguments = [part.replace("PATH", str(tmp_path)) for part in COMMANDS[command]]

    assert apart(call_with_a_bug, [command, *arguments]) == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_with_json_an_error_is_json_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    missing = tmp_path / "missing"
    arguments = [part.replace("PATH", str(missing)) for part in COMMANDS[command]]

    code = run([command, *arguments, "--json"])

    out, err = capsys.readouterr()
    assert code == 2
    error = json.loads(out)["error"]
    assert str(missing) in error["message"]
    assert "\n" not in err.strip()
