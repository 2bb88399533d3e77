"""The problems of a checkpoint. One set of rules finds them, for a load and for `verify`.

A rule hands a problem to `Problems`. In a load they raise it at once. In `verify` they are
`AllProblems`, which keep it, and the rule goes on as if the wrong entry were not there. A rule that
cannot go on (a text is not JSON, say) raises the error, and `Problems.caught` keeps it.
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
    """One thing that is wrong, or odd.

    Attributes:
        file: The file within the checkpoint; "" if no file is to blame.
        key: The block's key in that file, or the table, or `table@slot`.
        text: The end of a sentence about it.
    """

    file: str
    key: str | None
    text: str

    def __str__(self) -> str:
        where = [self.file] if self.file else []
        where += [] if self.key is None else [repr(self.key)]
        return ": ".join((*where, self.text))


class Problems:
    """Raises the first problem. `location` is the checkpoint, for messages."""

    keeps = False  # whether a rule goes on after a problem

    def __init__(self, location: str) -> None:
        self.location = location

    def error(self, error: CheckpointError | ReadError) -> None:
        """Take a problem in the form in which a load raises it."""
        raise error

    def add(self, text: str, file: str | None = None, key: str | None = None) -> None:
        if file is None and key is not None:  # the name of a table, not of a block
            text, key = f"{key!r}: {text}", None
        self.error(CheckpointError(self.location, text, file, key))

    def take(self, found: Iterable[Problem]) -> None:
        for one in found:
            self.add(one.text, one.file or None, one.key)

    def blames(self, file: str, key: str | None = None) -> bool:  # noqa: ARG002  # none is kept
        """Say whether a problem is known of an entry, or of a file as a whole."""
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
    """Collects all problems, from any thread.

    Attributes:
        found: The problems, each once.
        notes: Oddities that do no harm.
    """

    keeps = True

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.found: dict[Problem, None] = {}
        self.notes: dict[Problem, None] = {}
        self._blamed: set[tuple[str, str | None]] = set()

    def error(self, error: CheckpointError | ReadError) -> None:
        """Keep a problem, but raise the error of a checkpoint that is missing or was replaced."""
        if isinstance(error, CheckpointNotFoundError | CheckpointChangedError):
            raise error
        if isinstance(error, CheckpointError):
            self.add(error.problem, error.shard, error.key)
        else:
            end = error.offset + error.length
            text = f"bytes [{error.offset}, {end}) cannot be read: {error.problem}"
            self.add(text, error.shard)

    def add(self, text: str, file: str | None = None, key: str | None = None) -> None:
        self.found[Problem(file or "", key, text)] = None
        self._blamed.add((file or "", key))

    def note(self, text: str, file: str = "", key: str | None = None) -> None:
        """Keep an oddity that does no harm."""
        self.notes[Problem(file, key, text)] = None

    def blames(self, file: str, key: str | None = None) -> bool:
        return (file, key) in self._blamed
