"""Processes that start at once: forked from a Python that has imported everything.

Importing torch and numba takes seconds of a processor, more than most commands that tests run.
What is about imports, options of Python itself, or variables that it reads at its start, wants
`subprocess`.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import threading
import types
from pathlib import Path
from subprocess import PIPE, CompletedProcess, TimeoutExpired
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Forked", "python"]

ROOT = Path(__file__).resolve().parents[1]

_IMPORTED = (
    "asyncloader._table.kernels",
    "asyncloader.cli._app",
    "asyncloader.loader",
    "asyncloader.saver",
    "asyncloader.tools",
    "rich.progress",
    "rich.table",
    "tests.oracle",
    "torch",
    "uvloop",
)


def python(
    *arguments: str | Path,
    stdout: int = PIPE,
    stderr: int = PIPE,
    env: Mapping[str, str] | None = None,
    timeout: float = 60,
) -> CompletedProcess[str]:
    """Run `python ARGUMENTS` to its end.

    Args:
        arguments: `-m MODULE …` or `-c CODE …`.
        stdout: Descriptor that gets what it prints; `PIPE` returns it.
        stderr: The same for its errors.
        env: Its environment; `None` is that of this process.
        timeout: Seconds.
    """
    process = Forked(arguments, stdout=stdout, stderr=stderr, env=env)
    out, err = process.communicate(timeout)
    assert process.returncode is not None
    return CompletedProcess(list(arguments), process.returncode, out, err)


class Forked:
    """A process; what `subprocess.Popen` is otherwise.

    Attributes:
        pid: Its number.
        returncode: What it ended with; the negative of a signal that killed it; `None` until
            `communicate` has returned.
        stdout: What it prints, if that is not taken by another descriptor.
        stderr: Its errors, likewise.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        *,
        stdout: int = PIPE,
        stderr: int = PIPE,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.returncode: int | None = None
        self.stdout: TextIO | None = None
        self.stderr: TextIO | None = None
        if stdout == PIPE:
            self.stdout, stdout = _piped()
        if stderr == PIPE:
            self.stderr, stderr = _piped()
        self._status, status = _piped()
        variables = dict(os.environ if env is None else env)
        request = json.dumps({"argv": list(map(str, arguments)), "env": variables})
        with Path(os.devnull).open("rb") as nothing:
            fds = [nothing.fileno(), stdout, stderr, status]
            socket.send_fds(_server(), [request.encode()], fds)
        theirs = [status]
        if self.stdout is not None:
            theirs.append(stdout)
        if self.stderr is not None:
            theirs.append(stderr)
        for end in theirs:
            os.close(end)
        self.pid = int(self._status.readline())

    def send_signal(self, number: int) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Return what it printed, and its errors, once it has ended.

        Raises:
            TimeoutExpired: If it takes longer than so many seconds; it is killed.
        """
        expired = threading.Event()

        def kill() -> None:
            expired.set()
            self.send_signal(signal.SIGKILL)

        timer = threading.Timer(timeout, kill)
        timer.start()
        texts: dict[TextIO, str] = {}

        def read(file: TextIO) -> None:
            with file:
                texts[file] = file.read()

        files = [file for file in (self.stdout, self.stderr) if file is not None]
        readers = [threading.Thread(target=read, args=(file,)) for file in files]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        with self._status:
            self.returncode = os.waitstatus_to_exitcode(int(self._status.readline()))
        timer.cancel()
        timer.join()
        if expired.is_set():
            raise TimeoutExpired(f"process {self.pid}", timeout)
        return (
            "" if self.stdout is None else texts[self.stdout],
            "" if self.stderr is None else texts[self.stderr],
        )


def _piped() -> tuple[TextIO, int]:
    reads, writes = os.pipe()
    return open(reads, encoding="utf-8"), writes  # noqa: PTH123  # a descriptor


@functools.cache
def _server() -> socket.socket:
    """Start the Python that is forked, one for all tests of this process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = "import sys, tests.forks; tests.forks.serve(int(sys.argv[1]))"
    command = [sys.executable, "-c", code, str(theirs.fileno())]
    server = subprocess.Popen(command, cwd=ROOT, pass_fds=[theirs.fileno()])
    theirs.close()

    def end() -> None:
        ours.close()
        server.wait()

    atexit.register(end)
    return ours


def serve(fd: int) -> None:
    """Fork a process for each request, until there is nobody who could send another."""
    for module in _IMPORTED:
        __import__(module)
    with socket.socket(fileno=fd) as requests:
        while True:
            text, fds, *_ = socket.recv_fds(requests, 1 << 20, 4)
            if not text:
                return None
            if not os.fork():
                requests.close()
                return _wait_for_one(json.loads(text), fds)
            for one in fds:
                os.close(one)
            _reap()


def _reap() -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return


def _wait_for_one(request: dict[str, Any], fds: list[int]) -> None:
    """Fork once more; tell the number of that process, and how it ends."""
    *standard, status = fds
    pid = os.fork()
    if not pid:
        os.close(status)
        return _become(request, standard)
    for one in standard:
        os.close(one)
    os.write(status, f"{pid}\n".encode())
    os.write(status, f"{os.waitpid(pid, 0)[1]}\n".encode())
    os._exit(0)


def _become(request: dict[str, Any], standard: list[int]) -> None:
    for number, fd in enumerate(standard):
        os.dup2(fd, number)
        os.close(fd)
    for name, fd, mode in (("stdin", 0, "r"), ("stdout", 1, "w"), ("stderr", 2, "w")):
        stream = open(fd, mode, 1 if fd == 2 or os.isatty(fd) else -1, "utf-8", closefd=False)  # noqa: SIM115
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)
    os.environ.clear()
    os.environ.update(request["env"])
    how, what, *rest = request["argv"]
    sys.argv = [how, *rest]
    if how == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), sys.modules["__main__"].__dict__)  # noqa: S102
