"""What a command's exit code says when it fails, and what programs can read of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from asyncloader.cli import run
from tests.oracle import write_checkpoint
from tests.processes import apart
from tests.support import data

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

COMMANDS = {
    "inspect": ["PATH"],
    "show": ["PATH", "t"],
    "load": ["PATH"],
    "verify": ["PATH"],
    "diff": ["PATH", "PATH"],
    "convert": ["PATH", "PATH.safetensors"],
    "bank": ["PATH"],
}


def call_with_a_bug(arguments: list[str]) -> int:
    """Run a command where torch cannot be asked for a dtype: nothing works then."""
    import torch  # noqa: PLC0415  # of the process that this runs in

    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("broken installation")

    for name in ("frombuffer", "empty", "zeros", "from_numpy"):
        setattr(torch, name, broken)
    return run(arguments)


def closed_pipe() -> int:
    """Return the end to write to of a pipe that nobody reads."""
    reads, writes = os.pipe()
    os.close(reads)
    return writes


def full_disk() -> int:
    """Return a file that takes nothing."""
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /dev/full")
@pytest.mark.parametrize(
    ("output", "codes"), [(closed_pipe, {2, 141}), (full_disk, {2})], ids=["pipe", "disk"]
)
@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "missing", "--json"],
        ["diff", "PATH", "missing", "--json"],
        ["diff", "PATH", "PATH", "--json"],
        ["inspect", "PATH", "--no-such-option", "--json"],
        ["--version"],
    ],
    ids=" ".join,
)
def test_output_that_nobody_takes_is_no_answer(
    tmp_path: Path, arguments: list[str], output: Callable[[], int], codes: set[int]
) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.ones(1)})
    out = output()
    command = [part.replace("PATH", str(tmp_path)) for part in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "asyncloader", *command],
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    os.close(out)
    assert done.returncode in codes, done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) <= 1


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
