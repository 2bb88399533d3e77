"""The list of a run's checkpoints: the file `checkpoint`, an id a line, the newest last."""

from __future__ import annotations

import contextlib
import os
import posixpath
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from asyncloader._addresses import address_of, is_url
from asyncloader._arguments import check_count
from asyncloader._checkpoint.format import INDEX, RUN_LIST, SIDECAR, STAGING
from asyncloader._checkpoint.index import is_file_name
from asyncloader.errors import SaveError

from .leftovers import files_of, remove_dead, telling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncloader._storage.folder import RenamingFolder, WritableFolder


_STAGED = f"{STAGING}{RUN_LIST}"
# Another save holds the list for milliseconds.
_PATIENCE, _PAUSE = 30.0, 0.02
_LONGEST = 16 << 20  # bytes


@dataclass(slots=True)
class RunList(ABC):
    """One save's change of the list. Every method belongs on a thread.

    Attributes:
        folder: The run folder.
        name: The id of the checkpoint that is being saved.
        max_keep: How many checkpoints stay; `None`: all.
        told: Receives warnings.
        evicted: Ids of checkpoints that were removed.
    """

    folder: WritableFolder
    name: str
    max_keep: int | None
    told: list[str]
    evicted: tuple[str, ...] = field(default=(), init=False)

    @abstractmethod
    def staged(self) -> contextlib.AbstractContextManager[None]:
        """Make room for the new list, and keep others from the list within the block."""

    @abstractmethod
    def publish(self) -> None:
        """Put our line at the end of the list; within `staged`.

        Raises:
            SaveError: If that fails.
        """

    @abstractmethod
    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Keep others from the list within the block, where that can be."""

    @abstractmethod
    def _strike(self, gone: set[str]) -> None:
        """Remove lines."""

    def lines(self) -> list[str]:
        """Return the lines of the list as it is.

        Raises:
            SaveError: If it is none.
        """
        try:
            if self.folder.size(RUN_LIST) > _LONGEST:
                problem = f"longer than {_LONGEST:,} bytes, so no list of checkpoints"
                raise SaveError(self.folder.location, problem, RUN_LIST)
            text = self.folder.read(RUN_LIST)
        except FileNotFoundError:
            return []
        stripped = (line.strip() for line in text.split(b"\n"))
        return [os.fsdecode(line) for line in stripped if line]  # as names are: never fails

    def unlisted(self, error: OSError) -> SaveError:
        """Return the error of a checkpoint that is not in the list."""
        problem = (
            f"{self.name!r} is saved, whole, but could not be put into the list: {error}; save "
            "it again, or add a line with its name at the end"
        )
        return SaveError(self.folder.location, problem, RUN_LIST)

    def evict(self) -> None:
        """Remove checkpoints that are not among the newest, then their lines; tell what went wrong.

        Looked up anew, as others may have saved since. In this order, so that what a crash leaves
        is removed after the next save.
        """
        if self.max_keep is None:
            return
        with telling(self.told, "older checkpoints could not be removed"):
            try:
                with self._alone():
                    self._evict()
            except SaveError as error:  # the new one is there, and listed
                self.told.append(f"older checkpoints could not be removed: {error}")

    def with_ours(self, lines: list[str]) -> list[str]:
        """Return lines with ours at the end."""
        return [*(line for line in lines if line != self.name), self.name]

    def _evict(self) -> None:
        lines, there = self.lines(), set(self.folder.names(""))
        for name in self._older(lines, there):
            with telling(self.told, f"{name!r}, which is old, could not be removed"):
                if self._remove(name):
                    self.evicted += (name,)
        gone = {  # also what is not there: a save may have died just before it wrote the list
            line for line in lines if line in self.evicted or {line, f"{line}/"}.isdisjoint(there)
        }
        if gone:
            self._strike(gone)

    def _older(self, lines: list[str], there: set[str]) -> Iterator[str]:
        """Yield the ids of checkpoints that are not among the newest."""
        kept = 0
        for line in dict.fromkeys(reversed(lines)):
            if line == self.name:
                kept += 1
                continue
            if not is_file_name(line) or line.startswith(".") or f"{line}/" not in there:
                continue  # a link, too, is none of ours
            with telling(self.told, f"{line!r}, which is old, cannot be looked at"):
                names = set(self.folder.names(line))
                kept += INDEX in names
                if kept > (self.max_keep or 0) or (kept == self.max_keep and _is_half_gone(names)):
                    yield line

    def _remove(self, name: str) -> bool:
        """Remove a checkpoint, if a `Saver` wrote it and nothing else is in it; say whether it did.

        Not one that is saved into right now.
        """
        inside = self.folder.inside(name)
        with inside.hold() as alone:
            names = set(inside.names(""))
            if not alone or SIDECAR not in names:
                return False
            if INDEX in names:  # else a dead save may hold the checkpoint
                remove_dead(inside, None, self.told, now=self.folder.changed_at(""))
            names = set(inside.names(""))
            others = sorted(names - set(files_of(inside, "", whole=True)))
            if others:
                which = ", ".join(map(repr, others[:3]))
                self.told.append(f"{name!r} is kept, though old: it also holds {which}")
                return False
            # First, or a reader might take the rest for whole.
            if INDEX in names:
                inside.remove(INDEX)
                inside.sync("")
            for file in sorted(names - {INDEX}, key=lambda file: (file == SIDECAR, file)):
                inside.remove(file)
        self.folder.remove_folder(name)
        return True


@dataclass(slots=True)
class RenamedRunList(RunList):
    """The list in a folder: written beside the old one, and renamed."""

    folder: RenamingFolder

    @contextlib.contextmanager
    def staged(self) -> Iterator[None]:
        """Write the new list beside the old one, and keep others from both within the block.

        So there is room for it, before a checkpoint is moved into place.
        """
        with self._alone():
            try:
                self._write(self.with_ours(self.lines()))
                yield
            finally:
                with contextlib.suppress(OSError):  # moved, most likely
                    self.folder.remove(_STAGED)

    def publish(self) -> None:
        """Move the new list into place; within `staged`.

        Raises:
            SaveError: If that fails.
        """
        try:
            self.folder.move(_STAGED, RUN_LIST)
            self.folder.sync("")
        except OSError as error:
            raise self.unlisted(error) from error

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        until = time.monotonic() + _PATIENCE
        while True:
            with self.folder.hold() as alone:
                if alone:
                    yield
                    return
            if time.monotonic() > until:
                problem = f"another process holds the run folder for {_PATIENCE:g} s already"
                raise SaveError(self.folder.location, problem, RUN_LIST)
            time.sleep(_PAUSE)

    def _write(self, lines: list[str]) -> None:
        with contextlib.closing(self.folder.create(_STAGED)) as file:
            file.write(0, [memoryview(text_of(lines))])
            file.sync()

    def _strike(self, gone: set[str]) -> None:
        """Remove lines."""
        self._write([line for line in self.lines() if line not in gone])
        self.folder.move(_STAGED, RUN_LIST)
        self.folder.sync("")


def text_of(lines: list[str]) -> bytes:
    """Return the text of a list."""
    return b"".join(os.fsencode(line) + b"\n" for line in lines)


def _is_half_gone(names: set[str]) -> bool:
    """Say whether a save died while it removed a checkpoint of which these are left."""
    is_ours = SIDECAR in names  # which goes last
    return is_ours and INDEX not in names and not any(one.startswith(STAGING) for one in names)


def check_layout(
    layout: object,
    extra: object,
    io_state: object,
    max_keep: int | None,
    path: str | os.PathLike[str],
) -> None:
    """Refuse what belongs to a run where there is none, and a folder that no list can name."""
    if layout not in {"checkpoint", "run"}:
        raise ValueError(f'layout is "checkpoint" or "run", got {layout!r}')
    for value, name in ((extra, "extra"), (io_state, "io_state")):
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name} maps names to values, got {type(value).__name__}")
    if max_keep is not None:
        check_count(max_keep, "max_keep")
    if layout == "checkpoint":
        if (extra, io_state, max_keep) != (None, None, None):
            raise ValueError('extra, io_state and max_keep are of a run: pass layout="run", too')
        return
    text = os.fspath(path)
    if is_url(text) and not address_of(text, "path").key:
        raise ValueError(f"path is RUN/ID, and {text!r} is a bucket, which no run is in")
    name = posixpath.basename(text.rstrip("/")) if is_url(text) else Path(path).absolute().name
    is_line = name == name.strip() and not {*"\r\n"} & {*name}
    if not name or name.startswith(".") or name == RUN_LIST or not is_line:
        raise ValueError(
            f"path is RUN/ID, and the id, {name!r}, becomes a line of the list RUN/{RUN_LIST}: it "
            f"must not be {RUN_LIST!r}, begin with a dot, hold a line's end, or end in spaces"
        )
