"""One version of a model in memory, and how much of it that takes."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeAlias

from torch import nn

from asyncloader.model import targets

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from asyncloader._loading.report import LoadReport
    from asyncloader._planning.plan import LoadPlan
    from asyncloader._table.hashtable import HashTable


# The id itself, and two words of the index, which begins half full.
_ID_BYTES = 8 + 16

Built: TypeAlias = "tuple[Mapping[str, HashTable] | None, Mapping[str, Tensor] | None] | nn.Module"
"""What a user's `build` returns."""

_Contents: TypeAlias = "tuple[Mapping[str, HashTable], Mapping[str, Tensor], nn.Module | None]"


class Model:
    """One version of a model: its tables and tensors, all of one checkpoint.

    Nothing in it changes while it is pinned. Once its memory has been given back, its attributes
    raise `RuntimeError`: the caller has kept it beyond the `with` block that pinned it.
    """

    __slots__ = ("_contents", "_path", "_report")

    def __init__(
        self,
        path: Path,
        tables: Mapping[str, HashTable],
        tensors: Mapping[str, Tensor],
        module: nn.Module | None,
    ) -> None:
        self._path = path
        self._contents: _Contents | None = (
            MappingProxyType(dict(tables)),
            MappingProxyType(dict(tensors)),
            module,
        )
        self._report: LoadReport | None = None

    def __repr__(self) -> str:
        if self._contents is None:
            return f"<Model {self.version!r}: its memory was given back>"
        tables, tensors, _ = self._contents
        return f"<Model {self.version!r}: {len(tables)} tables, {len(tensors)} tensors>"

    @property
    def version(self) -> str:
        """The name of its folder."""
        return self._path.name

    @property
    def path(self) -> Path:
        """Its checkpoint."""
        return self._path

    @property
    def tables(self) -> Mapping[str, HashTable]:
        """By the names that `build` gave them, or, of a module, by their own."""
        return self._held[0]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By name; of a module, those of its `state_dict()`."""
        return self._held[1]

    @property
    def module(self) -> nn.Module:
        """What `build` returned, if that was a module.

        Raises:
            AttributeError: If it was not.
        """
        module = self._held[2]
        if module is None:
            raise AttributeError("build() returned tables and tensors, not a torch.nn.Module")
        return module

    @property
    def report(self) -> LoadReport:
        """What its load did."""
        if self._report is None:
            raise RuntimeError(f"{self!r} is not loaded yet")
        return self._report

    @report.setter
    def report(self, report: LoadReport) -> None:
        self._report = report

    @property
    def _held(self) -> _Contents:
        if self._contents is None:
            raise RuntimeError(
                f"version {self.version!r} was let go and its memory given back: use a model "
                "within the `with live.use()` block that pins it"
            )
        return self._contents

    def take_contents(self) -> object:
        """Return what takes memory, which is given back when the caller drops it."""
        contents, self._contents = self._contents, None
        return contents

    def shares_memory_with(self, other: Model) -> bool:
        """Say whether a table or a tensor of both is the same, unless the other's were given back.

        Looks at every tensor.
        """
        if (theirs := other._contents) is None:
            return False
        return not _identities(*self._held[:2]).isdisjoint(_identities(*theirs[:2]))


def tensor_bytes(model: Model) -> int:
    """Return the bytes that a model's tensors take; tensors that share memory count once."""
    storages = {
        (storage.device, storage.data_ptr()): storage.nbytes()
        for storage in (tensor.untyped_storage() for tensor in model.tensors.values())
    }
    return sum(storages.values())


def row_bytes(plan: LoadPlan, model: Model) -> int:
    """Return the bytes that a model's tables take once a plan is carried out.

    An estimate where the checkpoint was written by another number of ranks.
    """
    return sum(load.expected * _bytes_a_row(model.tables[load.name]) for load in plan.tables)


def _bytes_a_row(table: HashTable) -> int:
    slots = table.slots().values()
    return _ID_BYTES + sum(math.prod(slot.shape) * slot.dtype.itemsize for slot in slots)


def _identities(tables: Mapping[str, HashTable], tensors: Mapping[str, Tensor]) -> set[int]:
    """Return what tells tables and tensors from those of another model."""
    storages = (tensor.untyped_storage() for tensor in tensors.values())
    memory = {storage.data_ptr() for storage in storages if storage.nbytes()}
    return memory | {id(table) for table in tables.values()}


def model_of(path: Path, built: object) -> Model:
    """Wrap what a user's `build` returned.

    Raises:
        TypeError: If it is neither a module nor tables and tensors.
        ValueError: If two tables have the same name.
    """
    if isinstance(built, nn.Module):
        return Model(path, *targets(built), built)
    if isinstance(built, tuple) and len(built) == 2:  # noqa: PLR2004  # tables, tensors
        tables, tensors = built
        return Model(path, tables or {}, tensors or {}, None)
    raise TypeError(
        f"build() returns (hashtables, tensors) or a torch.nn.Module, got {type(built).__name__}"
    )
