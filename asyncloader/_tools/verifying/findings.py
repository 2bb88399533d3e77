"""The result of `verify`: problems, notes, and how much was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from asyncloader._checkpoint.problems import Problem

if TYPE_CHECKING:
    from collections.abc import Iterable


Severity = Literal["problem", "note"]
"""A problem: bytes or rows are wrong, lost, or cannot be read. A note: odd, but no harm is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is wrong or odd."""

    severity: Severity
    text: str
    file: str | None = None
    """The file within the checkpoint, if it is about one."""

    name: str | None = None
    """The block's key in that file, or the table, or `table@slot`."""

    def __str__(self) -> str:
        return str(Problem(self.file or "", self.name, self.text))


def findings(severity: Severity, found: Iterable[Problem]) -> tuple[Finding, ...]:
    """Return findings by file and name."""
    return tuple(
        Finding(severity=severity, text=one.text, file=one.file or None, name=one.key)
        for one in sorted(found, key=lambda one: (one.file, one.key or "", one.text))
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """How much was looked at, and everything that was found."""

    location: str
    kind: str
    """`RecIS checkpoint`, `safetensors file` or `Hugging Face folder`."""

    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    files: int
    """Files that were read, also the files with names and digests."""

    tables: int
    tensors: int
    blocks: int
    ids: int
    bytes_read: int
    """Of blocks."""

    digests: int
    """How many were compared."""

    seconds: float

    @property
    def ok(self) -> bool:
        """Whether there is no problem."""
        return not self.problems
