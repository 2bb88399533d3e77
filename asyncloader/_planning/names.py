"""The names that a bank decides on: of a model, and of the checkpoints it may come from."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._checkpoint.format import MODEL
from asyncloader._checkpoint.parts import ID

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from collections.abc import Set as AbstractSet

    from asyncloader._checkpoint.index import Catalog

    from .targets import Targets


OPTIMIZER = "recis.dense.optim."
"""The state of the dense optimizer: RecIS's name for it ends in a dot."""
IO_WORDS = ("train_io", "eval_io")
"""What `io_state_<rank>.pt` holds."""
WORDS = (
    "global_step", "train_epoch", *IO_WORDS, "train_window_io", "eval_window_io", OPTIMIZER,
)  # fmt: skip
"""The names of a model that are no tensors: plain values of `extra.pt` and `io_state_<rank>.pt`."""
SERVED_WORDS = frozenset({"global_step", "train_epoch"})
"""Those of use to a model that is not trained."""

_IO_STATE = ("train_epoch", *IO_WORDS, "train_window_io", "eval_window_io")
_OF_OPTIMIZERS = "sparse_"  # begins the names of their slots and scalars


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNames(Collection[str]):
    """The names of a model, in order: `child@slot`, tensors, and the words.

    Attributes:
        tables: Child → its slots, `id` first.
        tensors: Dense tensors, and the scalars of sparse optimizers.
        slots: Of each name of a table: its child and slot.
    """

    tables: Mapping[str, Sequence[str]]
    tensors: AbstractSet[str]
    slots: Mapping[str, tuple[str, str]]

    @classmethod
    def of(cls, tables: Mapping[str, Sequence[str]], tensors: AbstractSet[str]) -> ModelNames:
        slots = {f"{t}@{slot}": (t, slot) for t, held in tables.items() for slot in held}
        return cls(tables=tables, tensors=tensors, slots=slots)

    @classmethod
    def of_targets(cls, targets: Targets) -> ModelNames:
        tables = {child: (ID, *target.slots) for child, target in targets.tables.items()}
        return cls.of(tables, targets.tensors.keys())

    def __contains__(self, name: object) -> bool:
        return name in self.slots or name in self.tensors or name in WORDS

    def __iter__(self) -> Iterator[str]:
        yield from self.slots
        yield from (name for name in self.tensors if name not in self.slots)
        yield from (name for name in WORDS if name not in self.slots and name not in self.tensors)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def is_word(self, name: str) -> bool:
        return name in WORDS and name not in self.tensors and name not in self.slots

    def kind(self, name: str) -> str:
        """Return which switch of a `load_conf` a name belongs to."""
        if name in self.slots:
            optimizer = self.slots[name][1].startswith(_OF_OPTIMIZERS)
            return "sparse_opt" if optimizer else "sparse"
        if self.is_word(name):
            return "io_state" if name in IO_WORDS else "extra"
        scalar = name.startswith(_OF_OPTIMIZERS) and "." not in name
        return "sparse_opt" if scalar else "dense"

    def group(self, name: str) -> Sequence[str]:
        """Return the names that one stands for which is no name itself; perhaps none."""
        if name in self.tables:
            return [f"{name}@{slot}" for slot in self.tables[name]]
        if name == "io_state":
            return [one for one in _IO_STATE if self.is_word(one)]
        return [OPTIMIZER] if f"{name}." == OPTIMIZER else []

    def matching(self, pattern: str) -> Sequence[str]:
        """Return the names that a pattern matches; one that is a name matches itself only."""
        if pattern in self:
            return [pattern]
        if not is_pattern(pattern):
            return self.group(pattern)
        if pattern == "*":
            return list(self)
        fits = re.compile(fnmatch.translate(pattern)).match
        return [name for name in self if fits(name)]


def is_pattern(text: str) -> bool:
    return any(sign in text for sign in "*?[")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SourceNames:
    """The names of one checkpoint.

    Attributes:
        path: Its folder.
        catalog: Its tables and tensors.
    """

    path: str
    catalog: Catalog

    def has(self, name: str, model: ModelNames, own: str) -> bool:
        """Say whether it has `name`, a slot or tensor as the model's name `own` is."""
        if own in model.slots:
            slot = model.slots[own][1]
            table = name.removesuffix(f"@{slot}")
            return table != name and slot in self.catalog.tables.get(table, {})
        return name in self.catalog.tensors

    def is_of_model(self, name: str) -> bool:
        """Say whether a tensor stands in `model.pt`: parameters and buffers, no scalars."""
        return self.catalog.tensors.shards.get(name) == MODEL
