"""Where a conversion goes: checked before anything is read. All of this blocks."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from asyncloader.errors import SaveError

if TYPE_CHECKING:
    from collections.abc import Iterator


_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class Destination:
    """A file or folder to write."""

    path: Path

    is_file: bool
    """Whether it is one plain safetensors file, rather than a checkpoint's folder."""

    made: tuple[Path, ...]
    """Folders that were not there before, the outermost first."""

    @classmethod
    def checked(cls, source: str, path: str, *, overwrite: bool) -> Destination:
        """Say what the path stands for.

        Raises:
            SaveError: If it would harm the source, or something is there that must not be replaced.
        """
        target = Path(path)
        is_file = target.name.endswith(_SUFFIX)
        _check_apart(source, target)
        if is_file and target.is_dir():
            problem = f"is a folder; a name that ends in {_SUFFIX} is taken for a file"
            raise SaveError(path, problem)
        if not is_file and target.exists() and not target.is_dir():
            problem = "is a file, but a checkpoint is a folder; a plain file's name has to end "
            raise SaveError(path, problem + f"in {_SUFFIX}")
        if not overwrite and _is_occupied(target):
            raise SaveError(path, "is there already; give another place, or --overwrite")
        home = target.parent if is_file else target
        return cls(path=target, is_file=is_file, made=tuple(_missing(home)))

    def begin(self) -> None:
        """Make the folders that are missing."""
        for folder in self.made:
            folder.mkdir(exist_ok=True)

    def give_up(self) -> None:
        """Remove the folders that were made, where nobody has put anything into them."""
        for folder in reversed(self.made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _check_apart(source: str, target: Path) -> None:
    one, other = Path(os.path.realpath(source)), Path(os.path.realpath(target))
    if one == other:
        raise SaveError(str(target), "is the source itself; give another place")
    if one in other.parents:
        raise SaveError(str(target), f"lies within the source {source}; give another place")
    if other in one.parents:
        raise SaveError(str(target), f"holds the source {source}; give another place")


def _is_occupied(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return os.path.lexists(path)


def _missing(folder: Path) -> Iterator[Path]:
    if not folder.exists() and folder.parent != folder:
        yield from _missing(folder.parent)
        yield folder
