"""What was found to be wrong or odd, and what was looked at."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from asyncloader.errors import CheckpointError


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
        where = [] if self.file is None else [self.file]
        where += [] if self.name is None else [repr(self.name)]
        return ": ".join((*where, self.text))


@dataclass(slots=True)
class Findings:
    """Collects findings; from any thread."""

    found: list[Finding] = field(default_factory=list)

    def problem(self, text: str, *, file: str | None = None, name: str | None = None) -> None:
        """Add a problem."""
        self.found.append(Finding(severity="problem", text=text, file=file, name=name))

    def note(self, text: str, *, file: str | None = None, name: str | None = None) -> None:
        """Add a note."""
        self.found.append(Finding(severity="note", text=text, file=file, name=name))

    def error(self, error: CheckpointError) -> None:
        """Add what a reader would have raised."""
        self.problem(error.problem, file=error.shard, name=error.key)

    def of(self, severity: Severity) -> tuple[Finding, ...]:
        """Return those of one kind, by file and name."""
        chosen = {finding for finding in self.found if finding.severity == severity}
        return tuple(sorted(chosen, key=_order))


def _order(finding: Finding) -> tuple[str, str, str]:
    return finding.file or "", finding.name or "", finding.text


@dataclass(frozen=True, slots=True, kw_only=True)
class Verification:
    """What was looked at, and what was found."""

    location: str
    kind: str
    """`RecIS checkpoint`, `safetensors file` or `Hugging Face folder`."""

    problems: tuple[Finding, ...]
    notes: tuple[Finding, ...]
    files: int
    """Files that were read, those with names and digests included."""

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
