"""For programs that are written for RecIS: its `Loader`, `Saver` and `CheckpointReader`.

They have the names, arguments and return values of `recis.serialize`, of RecIS 1.0.0 to 1.2, so
that a program changes one import:

```python
from asyncloader.recis import CheckpointReader, Loader, Saver  # was: recis.serialize
```

RecIS's own framework saves and loads by them after

```python
from recis.framework import checkpoint_manager
checkpoint_manager.SLoader, checkpoint_manager.SSaver = Loader, Saver
```

After a load or a save, `report` says what it did.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any, Unpack

from . import loader, saver
from ._checkpoint.slices import gen_slice
from ._loading.planner import identity
from ._table.recis import RecISTable, is_of_recis
from .reader import CheckpointReader
from .saver import every_block

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import torch

    from ._checkpoint.slices import Slice
    from ._loading.report import LoadReport
    from ._planning.targets import LoadInfo
    from ._saving.layout import WriteBlock
    from ._saving.report import SaveReport
    from .options import LoadKeywords

__all__ = ["CheckpointReader", "Loader", "Saver"]

_log = logging.getLogger("asyncloader.recis")


class Loader:
    """RecIS's `Loader`: fills RecIS's tables, or `HashTable`s, and tensors.

    Args:
        checkpoint_path: The folder of a checkpoint.
        hashtables: Tables by name, such as those of `split_sparse_dense_state_dict`.
        tensors: Tensors by name.
        parallel: Reads at a time.
        filter_func: Gets the load info, and returns the one to use.
        slice: The ids that RecIS's tables accept. A table of RecIS does not tell; so by default it
            is what RecIS's embeddings give their tables, the share of this rank of
            `torch.distributed`, or of the environment's `RANK` and `WORLD_SIZE`.
        **read: Further arguments of `asyncloader.Loader` that say how to read.

    Attributes:
        report: What the last load did.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense.
    """

    report: LoadReport | None = None

    def __init__(  # RecIS's order
        self,
        checkpoint_path: str | os.PathLike[str],
        hashtables: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        parallel: int = 16,
        filter_func: Callable[[LoadInfo], LoadInfo] = identity,
        *,
        slice: Slice | None = None,  # noqa: A002  # RecIS's name
        **read: Unpack[LoadKeywords],
    ) -> None:
        if slice is None and any(map(is_of_recis, (hashtables or {}).values())):
            slice = gen_slice(*_rank())  # noqa: A001  # RecIS's name
        tables = _with_slice(hashtables, slice)
        self._loader = loader.Loader(
            checkpoint_path, tables, tensors, parallel, filter_func, **read
        )

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{self._loader!r}>"

    def load(self, print_load_summary: bool = False) -> None:  # noqa: FBT001, FBT002  # RecIS's
        """Load, and return when it is done.

        Args:
            print_load_summary: Whether to log what was loaded, and what the checkpoint lacks.

        Raises:
            AsyncLoaderError: As `asyncloader.Loader.load`.
        """
        self.report = self._loader.load()
        self._tell(print_load_summary)

    async def aload(self, print_load_summary: bool = False) -> None:  # noqa: FBT001, FBT002
        """Load on the caller's event loop; see `load`."""
        self.report = await self._loader.aload()
        self._tell(print_load_summary)

    def default_load_info(self) -> LoadInfo:
        """Return the load info that `filter_func` gets: every destination from its own name."""
        return self._loader.default_load_info()

    def _tell(self, wanted: object) -> None:
        if not wanted or self.report is None:
            return
        for name, counts in self.report.tables.items():
            _log.info("table %s: %s rows", name, counts.rows)
        for name, how in self.report.tensors.items():
            _log.info("tensor %s: %s", name, how)
        _log.info("missing: %s", ", ".join(self.report.missing) or "nothing")


class Saver:
    """RecIS's `Saver`: saves RecIS's tables, or `HashTable`s, and tensors.

    Args:
        shard_index: This rank.
        shard_num: How many ranks save.
        parallel: Files that this rank writes.
        path: The folder that becomes the checkpoint.
        hashtables: Tables by name. Those of RecIS hold the slice of this rank.
        tensors: Tensors by name.
        filter_func: Gets all blocks, and returns the ones to write.
        **options: Further arguments of `asyncloader.Saver`.

    Attributes:
        report: What the last save did.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense.
    """

    report: SaveReport | None = None

    def __init__(  # noqa: PLR0917  # RecIS's order
        self,
        shard_index: int = 0,
        shard_num: int = 1,
        parallel: int = 8,
        path: str | os.PathLike[str] = ".",
        hashtables: Mapping[str, Any] | None = None,
        tensors: Mapping[str, torch.Tensor] | None = None,
        filter_func: Callable[[list[WriteBlock]], list[WriteBlock]] = every_block,
        **options: Any,  # noqa: ANN401  # each of its own type
    ) -> None:
        tables = _with_slice(hashtables, gen_slice(shard_index, shard_num))
        self._saver = saver.Saver(
            shard_index, shard_num, parallel, path, tables, tensors, filter_func, **options
        )

    def __repr__(self) -> str:
        return f"<{type(self).__module__}.{self._saver!r}>"

    def save(self) -> None:
        """Save, and return when it is done.

        Raises:
            AsyncLoaderError: As `asyncloader.Saver.save`.
        """
        self.report = self._saver.save()

    async def asave(self) -> None:
        """Save on the caller's event loop; see `save`."""
        self.report = await self._saver.asave()


def _with_slice(tables: Mapping[str, Any] | None, part: Slice | None) -> dict[str, Any] | None:
    """Return tables by name, those of RecIS with their slice."""
    if tables is None:
        return None
    return {
        name: RecISTable(table, slice=part, name=str(name)) if is_of_recis(table) else table
        for name, table in tables.items()
    }


def _rank() -> tuple[int, int]:
    """Return this rank, and how many there are."""
    import torch.distributed as dist  # noqa: PLC0415  # where a program has imported it already

    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    rank, ranks = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and ranks.isdecimal() and int(rank) < int(ranks)):
        raise ValueError(
            f"the environment says RANK={rank!r} and WORLD_SIZE={ranks!r}: set both, or give slice="
        )
    return int(rank), int(ranks)
