"""A real file system that fails, gives little, or never answers, as a test tells it to.

    python -m tests.hanging_disk FOLDER MOUNTPOINT

serves a folder's files read-only through the kernel's FUSE, whose protocol is spoken here directly:
it takes no library, only `/dev/fuse` and the right to mount. Reads are not cached, so each is what
the program asked for. What shall go wrong comes by stdin, a JSON object a line; its end, or that of
this process, ends everything that still waits: with an error, `ENOTCONN`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import signal
import stat
import struct
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["HangingDisk", "NotMountableError", "hanging_disk"]

_PATIENCE = 20
_LONGEST = 1 << 20
_ROOT = 1
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _STATFS, _RELEASE = 1, 2, 3, 14, 15, 17, 18
_FLUSH, _INIT, _OPENDIR, _READDIR, _RELEASEDIR = 25, 26, 27, 28, 29
_INTERRUPT, _FORGET_MANY = 36, 42
_UNANSWERED = {_FORGET, _INTERRUPT, _FORGET_MANY}
_ASYNC_READ, _MAX_PAGES, _DIRECT_IO = 1 << 0, 1 << 22, 1 << 0
_MS_RDONLY, _MNT_DETACH = 1, 2
_REQUEST = struct.Struct("<IIQQIIIHH")
_ANSWER = struct.Struct("<IiQ")
_READ_IN = struct.Struct("<QQI")


class NotMountableError(Exception):
    """There is no FUSE here, or nobody may mount."""


# --- for tests


@dataclass
class HangingDisk:
    """A file system that is mounted, in a test's hands."""

    path: Path
    server: subprocess.Popen[str]

    def fail(self, name: str, code: int, *, times: int = 1 << 30, on: str = "read") -> None:
        """Answer so many reads (or `on="open"`) of a file with an error."""
        self._tell({"name": name, "fault": "error", "code": code, "times": times, "on": on})

    def give(self, name: str, at_most: int) -> None:
        """Give no more than so many bytes a read of a file."""
        self._tell({"name": name, "fault": "little", "at_most": at_most, "on": "read"})

    def hang(self, name: str, *, begin: int = 0, on: str = "read") -> None:
        """Answer no read (or `on="open"`) of a file any more, from an offset on.

        No look at which names there are, where `name` is empty and `on` is `"list"`.
        """
        self._tell({"name": name, "fault": "hang", "begin": begin, "on": on})

    def die(self) -> None:
        """Answer nothing any more: no read, no look at a file, no closing of one."""
        self._tell({"fault": "dead"})

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Take no request any more, for the length of the block.

        Unlike those that were taken and get no answer, the kernel ends such for who is killed.
        """
        self.server.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.server.send_signal(signal.SIGCONT)

    def heal(self) -> None:
        """Serve all files as they are from now on, and answer whoever still waits."""
        self._tell({"fault": "none"})

    def until_somebody_waits(self) -> None:
        """Return once somebody waits for an answer that does not come. Blocks."""
        self._expect("hangs")

    def _tell(self, rule: dict[str, object]) -> None:
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps(rule) + "\n")
        self.server.stdin.flush()
        self._expect("noted")

    def _expect(self, word: str) -> None:
        while (said := _line(self.server)) != word:
            assert said, f"the disk does not say {word!r}"


def _line(server: subprocess.Popen[str]) -> str:
    """Return what a server says next; nothing if it does not, or is gone."""
    assert server.stdout is not None
    line = b""
    while not line.endswith(b"\n"):
        ready, _, _ = select.select([server.stdout], [], [], _PATIENCE)
        letter = os.read(server.stdout.fileno(), 1) if ready else b""  # past every buffer
        if not letter:
            return ""
        line += letter
    return line.decode().strip()


@contextlib.contextmanager
def hanging_disk(folder: Path, at: Path) -> Iterator[HangingDisk]:
    """Serve a folder's files at another place for the length of the block.

    Whatever happens, nobody waits for this disk afterwards.

    Raises:
        NotMountableError: If that cannot be done here.
    """
    if sys.platform != "linux" or not Path("/dev/fuse").exists():
        raise NotMountableError("there is no /dev/fuse")
    at.mkdir(exist_ok=True)
    server = subprocess.Popen(
        [sys.executable, "-m", __name__, str(folder), str(at)],
        cwd=Path(__file__).resolve().parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        bufsize=1,
        text=True,
    )
    disk = HangingDisk(at, server)
    try:
        if (word := _line(server)) != "ready":
            raise NotMountableError(word)
        yield disk
    finally:
        server.kill()  # the kernel ends all that waits
        with contextlib.suppress(OSError):
            _unmount(at)
        server.communicate(timeout=_PATIENCE)


def _unmount(path: Path) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.umount2(os.fsencode(path), _MNT_DETACH):
        raise OSError(ctypes.get_errno(), "cannot be unmounted", str(path))


# --- the server


class _Request(NamedTuple):
    code: int
    unique: int
    node: int
    body: bytes


class _Silence(Exception):  # noqa: N818  # nothing went wrong
    """There is no answer, for now."""


@dataclass
class _Server:
    """One thread is enough: who is not answered waits in a list."""

    folder: Path
    device: int
    names: list[str] = field(default_factory=list)
    """The file of node `number + 2`."""

    rules: dict[str, dict[str, Any]] = field(default_factory=dict)
    waiting: list[_Request] = field(default_factory=list)
    is_dead: bool = False

    def serve(self) -> None:
        """Answer until nobody tells us what to do any more."""
        poll = select.poll()
        poll.register(self.device, select.POLLIN)
        poll.register(sys.stdin, select.POLLIN | select.POLLHUP)
        while True:
            for fd, _ in poll.poll():
                if fd != self.device:
                    if not (line := sys.stdin.readline()):
                        return
                    self._note(json.loads(line))
                elif not self._take():
                    return

    def _note(self, rule: dict[str, Any]) -> None:
        self.is_dead = rule["fault"] == "dead"
        if rule["fault"] == "none":
            self.rules.clear()
        elif not self.is_dead:
            self.rules[rule["name"]] = rule
        print("noted", flush=True)  # noqa: T201  # to the test
        waiting, self.waiting = self.waiting, []
        for request in waiting:
            self._answer(request)

    def _take(self) -> bool:
        try:
            text = os.read(self.device, _LONGEST + 4096)
        except OSError as error:
            return error.errno in {errno.EINTR, errno.ENOENT}  # it was taken back, or unmounted
        _, code, unique, node, *_ = _REQUEST.unpack_from(text)
        self._answer(_Request(code, unique, node, text[_REQUEST.size :]))
        return True

    def _answer(self, request: _Request) -> None:
        if request.code in _UNANSWERED:
            return
        try:
            if self.is_dead:
                raise _Silence  # noqa: TRY301  # as where one of them is not answered
            body, code = self._carry_out(request), 0
        except _Silence:
            self.waiting.append(request)
            print("hangs", flush=True)  # noqa: T201  # to the test
            return
        except OSError as error:
            body, code = b"", error.errno or errno.EIO
        answer = _ANSWER.pack(_ANSWER.size + len(body), -code, request.unique) + body
        with contextlib.suppress(FileNotFoundError):  # whoever asked was killed
            os.write(self.device, answer)

    def _carry_out(self, request: _Request) -> bytes:
        does: dict[int, Callable[[_Request], bytes]] = {
            _INIT: self._init,
            _LOOKUP: self._lookup,
            _GETATTR: lambda one: struct.pack("<QII", 0, 0, 0) + self._attributes(one.node),
            _OPEN: self._open,
            _OPENDIR: lambda _: struct.pack("<QII", 0, 0, 0),
            _READ: self._read,
            _READDIR: self._list,
            _FLUSH: lambda _: b"",
            _RELEASE: lambda _: b"",
            _RELEASEDIR: lambda _: b"",
            _STATFS: lambda _: struct.pack("<5Q4I6I", 0, 0, 0, 0, 0, 4096, 255, 4096, 0, *[0] * 6),
        }
        if request.code not in does:
            raise OSError(errno.ENOSYS, "not done here")
        return does[request.code](request)

    def _init(self, request: _Request) -> bytes:
        _, _, ahead, flags = struct.unpack_from("<4I", request.body)
        flags &= _ASYNC_READ | _MAX_PAGES
        pages = _LONGEST // 4096
        return struct.pack(
            "<4IHHIIHH8I", 7, 31, ahead, flags, 64, 48, _LONGEST, 1, pages, 0, *[0] * 8
        )

    def _lookup(self, request: _Request) -> bytes:
        name = os.fsdecode(request.body.rstrip(b"\0"))
        (self.folder / name).lstat()  # or it is not there
        if name not in self.names:
            self.names.append(name)
        node = self.names.index(name) + _ROOT + 1
        return struct.pack("<4QII", node, 0, 0, 0, 0, 0) + self._attributes(node)

    def _path(self, node: int) -> Path:
        return self.folder if node == _ROOT else self.folder / self._name(node)

    def _name(self, node: int) -> str:
        return self.names[node - _ROOT - 1]

    def _attributes(self, node: int) -> bytes:
        found = self._path(node).stat()
        times = (found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns)
        return struct.pack(
            "<6Q10I",
            node,
            found.st_size,
            found.st_blocks,
            *(time // 10**9 for time in times),
            *(time % 10**9 for time in times),
            found.st_mode,
            found.st_nlink,
            *(0, 0, 0, 4096, 0),
        )

    def _open(self, request: _Request) -> bytes:
        self._obey(self._name(request.node), "open", 0, 0)
        return struct.pack("<QII", 0, _DIRECT_IO, 0)

    def _read(self, request: _Request) -> bytes:
        _, offset, size = _READ_IN.unpack_from(request.body)
        name = self._name(request.node)
        size = self._obey(name, "read", offset, size)
        with (self.folder / name).open("rb") as file:
            return os.pread(file.fileno(), size, offset)

    def _obey(self, name: str, on: str, offset: int, size: int) -> int:
        """Do as a file's rule says, and return how many bytes may be given."""
        rule = self.rules.get(name, {"on": ""})
        if rule["on"] != on:
            return size
        if rule["fault"] == "hang" and offset + size >= rule["begin"]:
            raise _Silence
        if rule["fault"] == "error" and rule["times"]:
            rule["times"] -= 1
            raise OSError(rule["code"], "as it was told to")
        at_most: int = rule.get("at_most", size)
        return min(size, at_most)

    def _list(self, request: _Request) -> bytes:
        _, offset, size = _READ_IN.unpack_from(request.body)
        self._obey("", "list", 0, 0)
        text = b""
        for number, name in enumerate(sorted(os.listdir(self.folder))[offset:], offset + 1):  # noqa: PTH208  # names
            raw = os.fsencode(name)
            entry = struct.pack("<QQII", number + _ROOT, number, len(raw), stat.S_IFREG >> 12) + raw
            entry += bytes(-len(entry) % 8)
            if len(text) + len(entry) > size:
                break
            text += entry
        return text


def _mount(at: Path) -> int:
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    how = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    library = ctypes.CDLL(None, use_errno=True)
    kind = b"fuse"
    if library.mount(kind, os.fsencode(at), kind, ctypes.c_ulong(_MS_RDONLY), how.encode()):
        raise OSError(ctypes.get_errno(), f"cannot be mounted: {os.strerror(ctypes.get_errno())}")
    return device


def main(folder: str, at: str) -> None:
    """Serve a folder."""
    try:
        device = _mount(Path(at))
    except OSError as error:
        print(error.strerror, flush=True)  # noqa: T201  # to the test
        return
    print("ready", flush=True)  # noqa: T201  # to the test
    _Server(Path(folder), device).serve()


if __name__ == "__main__":
    main(*sys.argv[1:])
