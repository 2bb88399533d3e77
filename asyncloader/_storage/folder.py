"""A folder, or the objects under a prefix: what is looked at, and written, name by name."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeAlias, runtime_checkable

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Sequence
    from concurrent.futures import Executor


@dataclass(frozen=True, slots=True)
class Entry:
    """What a name stands for; a link stands for what it leads to.

    Attributes:
        size: The length of a file in bytes; `None` of a folder, and of all else.
        identity: Another one if a file is written to, or another file takes its place: device,
            inode, length and time of the last change; of an object its length and ETag, or time.
        version: Of an object, in stores that have such.
        modified: When its content was last changed, in seconds since 1970, by the clock of the file
            system or store.
    """

    size: int | None
    identity: tuple[object, ...]
    modified: float
    version: str | None = field(default=None, compare=False)

    @property
    def tag(self) -> str:
        """The ETag, of an object; without quotation marks, which some lists leave out."""
        return str(self.identity[1]).strip('"')


class StoreRefusalError(PermissionError):
    """A store refused a request. Who may not list is told this of what is not there, too."""


def is_unclear(error: OSError) -> bool:
    """Say whether an error leaves open what is there: a disk or a server gave no answer."""
    unclear = {errno.EIO, errno.EPROTO, errno.ETIMEDOUT, errno.ESTALE}
    return error.errno in unclear or isinstance(error, StoreRefusalError)


class WritableFile(Protocol):
    """A file that is being written, by any number of threads."""

    def write(self, offset: int, views: Sequence[memoryview], /) -> None:
        """Write all of `views`, one after the other, from `offset` on. At most 1024 views.

        Of a folder that `writes_in_order` each byte comes once, and a write waits for those before
        it. Of others they come in any order.
        """
        ...

    def sync(self) -> None:
        """Return when all that was written would outlive a loss of power."""
        ...

    def abandon(self) -> None:
        """Have all writes fail that wait. Any thread may call this; it waits for nothing."""
        ...

    def close(self) -> None:
        """Let go of it; not twice."""
        ...


class Folder(Protocol):
    """Names are relative to the folder, parts separated by `/`; `""` is the folder itself.

    Every call but `aread` may block, and belongs on a thread. Every call may raise `OSError`, whose
    `filename` is `location` and the name, if anything.
    """

    shows_whole: bool
    """Whether a file is not there before it is written to its end."""

    dates_folders: bool
    """Whether it costs little to ask when each of many folders was last written to."""

    @property
    def location(self) -> str:
        """What to call it in messages: a path, or a URL."""
        ...

    def above(self) -> Folder:
        """Return the folder that this one is in."""
        ...

    def inside(self, name: str, /) -> Folder:
        """Return a folder in this one."""
        ...

    def resolved(self) -> Folder:
        """Return it by its real path: of a file, the path with the links before it resolved."""
        ...

    def stat(self, name: str, /) -> Entry | None:
        """Say what a name stands for; `None` if there is nothing."""
        ...

    def files(self, name: str, /) -> dict[str, Entry]:
        """Return the files in a folder by name, also links to files.

        Raises:
            FileNotFoundError: If it is not there.
        """
        ...

    def folders(self, name: str, /) -> list[str]:
        """Return the names of the folders in a folder, also links to folders.

        Raises:
            FileNotFoundError: If it is not there.
        """
        ...

    def total(self, name: str, /) -> int:
        """Return the bytes of all files beneath a folder."""
        ...

    def read(self, name: str, /, *, first: int | None = None, last: int | None = None) -> bytes:
        """Return a whole file, or at most so many of its first or last bytes."""
        ...

    async def aread(self, name: str, executor: Executor, /, *, last: int = -1) -> bytes:
        """Return a file, or at most its `last` bytes, which threads of the executor read."""
        ...


class WritableFolder(Folder, Protocol):
    """A folder that is written to."""

    writes_in_order: bool
    """Whether the bytes of a file have to come in order, each once."""

    def above(self) -> WritableFolder:
        """Return the folder that this one is in."""
        ...

    def inside(self, name: str, /) -> WritableFolder:
        """Return a folder in this one."""
        ...

    def names(self, name: str, /) -> list[str]:
        """Return what a folder holds, names of folders with a `/` behind them.

        Raises:
            FileNotFoundError: If it is not there.
        """
        ...

    def create(self, name: str, /, *, size: int = 0) -> WritableFile:
        """Begin a file anew, which will have about `size` bytes."""
        ...

    def size(self, name: str, /) -> int:
        """Return the length of a file in bytes."""
        ...

    def changed_at(self, name: str, /) -> float:
        """Return when a folder, or a file in it, was last changed, in seconds by its own clock."""
        ...

    def remove(self, name: str, /) -> None:
        """Remove a file."""
        ...

    def remove_folder(self, name: str, /) -> None:
        """Remove an empty folder."""
        ...

    def sync(self, name: str, /) -> None:
        """Return when a folder's names would outlive a loss of power."""
        ...

    def hold(self) -> contextlib.AbstractContextManager[bool]:
        """Hold the folder until the block ends, against any other process or thread that would.

        Yields:
            Whether no other does.
        """
        ...

    def make(self, name: str, /) -> None:
        """Make a folder, and its parents; fine if it is there."""
        ...


class RenamingFolder(WritableFolder, Protocol):
    """A folder in which a commit can be made by renaming."""

    def above(self) -> RenamingFolder:
        """Return the folder that this one is in."""
        ...

    def inside(self, name: str, /) -> RenamingFolder:
        """Return a folder in this one."""
        ...

    def move(self, source: str, target: str, /) -> None:
        """Rename a file; what had the new name is gone."""
        ...


@runtime_checkable
class ConditionalFolder(WritableFolder, Protocol):
    """A folder that nobody can hold, and where a file is written if it is what it was."""

    def above(self) -> ConditionalFolder:
        """Return the folder that this one is in."""
        ...

    def inside(self, name: str, /) -> ConditionalFolder:
        """Return a folder in this one."""
        ...

    def copy(self, source: str, target: str, /) -> None:
        """Copy a file of at most 5 GiB; what had the new name is gone."""
        ...

    def put(self, name: str, data: bytes, /, *, over: Entry | None) -> str:
        """Write a small file, if it is what it was: `over`, or nothing.

        Returns:
            The `tag` of the file's entry, as long as it stays as it is.

        Raises:
            FileExistsError: If it is something else; nothing was changed.
            OSError: `ENOTSUP` if this cannot be asked for, `EIO` if it may have been written.
        """
        ...


TargetFolder: TypeAlias = RenamingFolder | ConditionalFolder
"""What a checkpoint is saved to."""
