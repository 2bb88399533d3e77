"""The list of a run's checkpoints: the file `checkpoint`, an id a line, the newest last."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from asyncloader._arguments import check_count
from asyncloader._checkpoint.format import INDEX, RUN_LIST, SIDECAR, STAGING
from asyncloader._checkpoint.index import is_file_name
from asyncloader.errors import SaveError

from .leftovers import files_of, telling

if TYPE_CHECKING:
    from collections.abc import Iterator

    from asyncloader._storage.folder import Folder


_STAGED = f"{STAGING}{RUN_LIST}"
# Another save holds the list for milliseconds.
_PATIENCE, _PAUSE = 30.0, 0.02


@dataclass(slots=True)
class RunList:
    """One save's change of the list. Every method belongs on a thread.

    Attributes:
        folder: The run folder.
        name: The id of the checkpoint that is being saved.
        max_keep: How many checkpoints stay; `None`: all.
        told: Receives warnings.
        evicted: Ids of checkpoints that were, or are to be, removed.
    """

    folder: Folder
    name: str
    max_keep: int | None
    told: list[str]
    evicted: tuple[str, ...] = field(default=(), init=False)

    @contextlib.contextmanager
    def staged(self) -> Iterator[None]:
        """Write the new list beside the old one, and keep others from both within the block.

        So there is room for it, before a checkpoint is moved into place.
        """
        with self._alone():
            try:
                self._write(self._lines())
                yield
            finally:
                with contextlib.suppress(OSError):  # moved, most likely
                    self.folder.remove(_STAGED)

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

    def _lines(self) -> list[str]:
        """Return the new list; sets `evicted`."""
        try:
            text = self.folder.read(RUN_LIST)
        except FileNotFoundError:
            text = b""
        old = [os.fsdecode(line.strip()) for line in text.split(b"\n")]  # as names are: never fails
        lines = [line for line in old if line and line != self.name]
        self.evicted = tuple(self._surplus(lines))
        return [*(line for line in lines if line not in self.evicted), self.name]

    def _surplus(self, lines: list[str]) -> Iterator[str]:
        """Yield the ids to remove: what a `Saver` wrote, and is not among the newest.

        Nothing else is removed: not what RecIS wrote, nor a folder that holds other files, nor one
        that is saved into right now.
        """
        if self.max_keep is None:
            return
        kept, there = 1, set(self.folder.names(""))
        for line in dict.fromkeys(reversed(lines)):
            if not is_file_name(line) or line.startswith(".") or f"{line}/" not in there:
                continue  # a link, too, is none of ours
            names = set(self.folder.names(line))
            if INDEX not in names:
                continue
            kept += 1
            if kept > self.max_keep and SIDECAR in names:
                others = sorted(names - set(files_of(self.folder, line, whole=True)))
                if not others:
                    yield line
                else:
                    which = ", ".join(map(repr, others[:3]))
                    self.told.append(f"{line!r} is kept, though old: it also holds {which}")

    def _write(self, lines: list[str]) -> None:
        text = b"".join(os.fsencode(line) + b"\n" for line in lines)
        with contextlib.closing(self.folder.create(_STAGED)) as file:
            file.write(0, [memoryview(text)])
            file.sync()

    def publish(self) -> None:
        """Move the new list into place; within `staged`.

        Raises:
            SaveError: If that fails.
        """
        try:
            self.folder.move(_STAGED, RUN_LIST)
            self.folder.sync("")
        except OSError as error:
            problem = (
                f"{self.name!r} is saved, whole, but could not be put into the list: {error}; save "
                "it again, or add a line with its name at the end"
            )
            raise SaveError(self.folder.location, problem, RUN_LIST) from error

    def evict(self) -> None:
        """Remove what is no longer in the list; tell what went wrong."""
        for name in self.evicted:
            with telling(self.told, f"{name!r}, which is old, could not be removed"):
                names = self.folder.names(name)
                # First, or a reader might take the rest for whole.
                self.folder.remove(f"{name}/{INDEX}")
                self.folder.sync(name)
                for file in sorted(set(names) - {INDEX}):
                    self.folder.remove(f"{name}/{file}")
                self.folder.remove_folder(name)


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
    name = Path(path).absolute().name
    if not name or name.startswith(".") or name == RUN_LIST or name != name.strip() or "\n" in name:
        raise ValueError(
            f"path is RUN/ID, and the id, {name!r}, becomes a line of the list RUN/{RUN_LIST}: it "
            f"must not be {RUN_LIST!r}, begin with a dot, hold a line's end, or end in spaces"
        )
