"""What is followed: a checkpoint, a run folder, or the runs of a bank, whose versions are one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from asyncloader._arguments import checked_source
from asyncloader._planning.bank import Bank
from asyncloader._planning.names import SERVED_WORDS
from asyncloader.loader import Loader

from .source import Candidate, candidate, newest

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

    from asyncloader._planning.bank import Entries
    from asyncloader._storage.looks import Looks
    from asyncloader.options import ReadOptions

    from .model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Sought:
    """Finds the newest version, and makes its loader.

    Attributes:
        paths: The run folders, or the one checkpoint, that are looked at, as they were given.
        bank: The entries, of which those that are dynamic have these paths; `None` without a bank.
    """

    paths: tuple[str, ...]
    bank: Bank | None = None

    @classmethod
    def of(cls, source: str | os.PathLike[str] | None, entries: Entries | None) -> Sought:
        """Return what there is to follow, of a source or of the entries of a bank.

        Raises:
            TypeError: If these are none, or both.
            ValueError: If entries are wrong, or none is dynamic.
        """
        if (source is None) is (entries is None):
            raise TypeError(
                "source must be a path, unless there is a bank: Live follows one of them"
            )
        if source is not None:
            return cls(paths=(checked_source(source, "source"),))
        bank = replace(Bank.of(entries), words=SERVED_WORDS)
        followed = [one.path for one in bank.entries if one.is_dynamic and not one.skip]
        if not followed:
            raise ValueError(
                "no entry of the bank has is_dynamic=True, so there is nothing to follow: load it "
                "with Loader.from_bank"
            )
        return cls(paths=tuple(dict.fromkeys(followed)), bank=bank)

    @property
    def location(self) -> str:
        """What to call it in messages; of one path, the path."""
        return " + ".join(self.paths)

    async def newest(self, looks: Looks) -> Candidate:
        """Return the newest version; raises what `source.newest` does."""
        return _joined([await newest(looks, path) for path in self.paths])

    def options(self, given: Mapping[str, Any]) -> ReadOptions:
        """Return how loaders with these arguments read; raises what they would raise."""
        if self.bank is not None:
            return Loader.from_bank(self.bank, **given).options
        return Loader(self.paths[0], **given).options

    def loader(self, version: Candidate, model: Model, options: Mapping[str, Any]) -> Loader:
        """Return the loader that fills a model with a version."""
        if self.bank is None:
            return Loader(version.location, model.tables, model.tensors, **options)
        found = [part.location for part in version.parts] or [version.location]
        at = dict(zip(self.paths, found, strict=True))
        return Loader.from_bank(self.bank.at(at), model.tables, model.tensors, **options)


async def again(looks: Looks, version: Candidate) -> Candidate:
    """Return a version as it is now; raises what `source.candidate` does."""
    parts = version.parts or (version,)
    return _joined([await candidate(looks, part.location) for part in parts])


def _joined(parts: Sequence[Candidate]) -> Candidate:
    """Return the versions of several runs as one."""
    if len(parts) == 1:
        return parts[0]
    return Candidate(
        location=" + ".join(part.location for part in parts),
        name=" + ".join(part.name for part in parts),
        identity=tuple(one for part in parts for one in part.identity),
        files={f"{p.location}/{name}": one for p in parts for name, one in p.files.items()},
        parts=tuple(parts),
    )
