"""The problems of a checkpoint. One set of rules finds them, for a load and for `verify`.

A rule hands a problem to `Problems`. In a load they raise it at once. In `verify` they are
`AllProblems`, which keep it, and the rule goes on as if the wrong entry were not there. A rule that
cannot go on, because a text is no JSON, say, raises the error; `Problems.caught` keeps it.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader.errors import (
    CheckpointChangedError,
    CheckpointError,
    CheckpointNotFoundError,
    ReadError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, or odd."""

    file: str
    """The file within the checkpoint; "" if no file is to blame."""

    key: str | None
    """The block's key in that file, or the table, or `table@slot`."""

    text: str

    def __str__(self) -> str:
        where = [self.file] if self.file else []
        where += [] if self.key is None else [repr(self.key)]
        return ": ".join((*where, self.text))


class Problems:
    """Raises the first problem.

    Args:
        location: The checkpoint, for messages.
    """

    def __init__(self, location: str) -> None:
        self.location = location

    def error(self, error: CheckpointError | ReadError) -> None:
        """Take a problem in the form in which a load raises it."""
        raise error

    def add(self, text: str, file: str | None = None, key: str | None = None) -> None:
        """Take a problem."""
        if file is None and key is not None:  # the name of a table, and of no block
            text, key = f"{key!r}: {text}", None
        self.error(CheckpointError(self.location, text, file, key))

    def take(self, found: Iterable[Problem]) -> None:
        """Take several problems."""
        for one in found:
            self.add(one.text, one.file or None, one.key)

    def blames(self, file: str, key: str | None = None) -> bool:  # noqa: ARG002  # none is kept
        """Say whether something is wrong with an entry, or with a file as a whole."""
        return False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Take an error of the `with` block, and end the block."""
        try:
            yield
        except (CheckpointError, ReadError) as error:
            self.error(error)

    @contextlib.contextmanager
    def about(self, file: str, key: str | None = None) -> Iterator[None]:
        """Take a `ValueError` of the `with` block as the problem of an entry, and end the block."""
        try:
            yield
        except ValueError as error:
            self.add(str(error), file, key)


class AllProblems(Problems):
    """Collects all problems, from any thread."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.found: dict[Problem, None] = {}
        """Each of them once."""

        self.notes: dict[Problem, None] = {}
        """Oddities that do no harm."""

        self._blamed: set[tuple[str, str | None]] = set()

    def error(self, error: CheckpointError | ReadError) -> None:
        """Keep a problem.

        Raises:
            CheckpointNotFoundError: If it is that there is no checkpoint at all.
            CheckpointChangedError: If it is that it was replaced meanwhile.
        """
        if isinstance(error, CheckpointNotFoundError | CheckpointChangedError):
            raise error
        if isinstance(error, CheckpointError):
            self.add(error.problem, error.shard, error.key)
        else:
            end = error.offset + error.length
            text = f"bytes [{error.offset}, {end}) cannot be read: {error.problem}"
            self.add(text, error.shard)

    def add(self, text: str, file: str | None = None, key: str | None = None) -> None:
        """Keep a problem."""
        self.found[Problem(file or "", key, text)] = None
        self._blamed.add((file or "", key))

    def note(self, text: str, file: str = "", key: str | None = None) -> None:
        """Keep something odd that does no harm."""
        self.notes[Problem(file, key, text)] = None

    def blames(self, file: str, key: str | None = None) -> bool:
        return (file, key) in self._blamed
