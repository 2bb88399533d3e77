"""For users who look into a checkpoint, or read all of its tensors."""

from __future__ import annotations

import operator
from functools import partial
from typing import TYPE_CHECKING, Self, Unpack

import torch

from ._loading.reading import Contents, read_stored, torch_dtype
from ._threads.blocking import run_blocking
from ._threads.jobs import run_jobs
from .options import ReadOptions

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from ._ready_stores import Source
    from .options import ReadKeywords

__all__ = ["CheckpointReader", "aload_tensors", "load_tensors"]


class CheckpointReader:
    """Reads single tensors of a checkpoint by name.

    A dense tensor goes by its name; a slot of a table by `table@slot`, and the table's ids by
    `table@id`: all rows that all ranks wrote, in the order of their slices, so that row *i* of
    each slot belongs to id *i*. Names are matched exactly.

    The methods are those of RecIS's `CheckpointReader`, and each has an awaitable twin whose name
    begins with `a`. Names and headers are read at the first call that needs them, and remembered;
    a file that is replaced afterwards is an error.

    ```python
    async with CheckpointReader(path) as reader:  # keeps files and threads for all calls
        ids = await reader.aread_tensor("item_emb@id")
    ```

    Without `async with`, each call opens its files and threads and closes them. The blocking
    methods always do.

    Args:
        checkpoint_path: A folder that holds `index`; a safetensors file; or a folder of these, as
            Hugging Face's are.
        options: How to read. All calls within one `async with` share the reads in flight and
            their bytes; `timeout` is for each call. Digests are of whole tensors: windows of rows
            are not verified.
        **read: Fields of `ReadOptions`, which go before `options`.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        checkpoint_path: Source,
        *,
        options: ReadOptions | None = None,
        **read: Unpack[ReadKeywords],
    ) -> None:
        self._path, how = ReadOptions.of(options, read).at(checkpoint_path, "checkpoint_path")
        self._contents = Contents(self._path, how)

    def __repr__(self) -> str:
        return f"<CheckpointReader {self._path!r}: {self._contents!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Do nothing: a blocking call leaves no file open."""

    async def __aenter__(self) -> Self:
        await self._contents.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._contents.__aexit__()

    async def atensor_names(self) -> list[str]:
        """Return all names: dense tensors, then `table@slot` of each table.

        Raises:
            CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
            ReadError: If the storage failed.
        """
        async with self._contents.use() as session:
            catalog = await self._contents.catalog(session)
            [names] = await run_jobs(session.threads.kernels, [catalog.whole().names])
        return list(names)

    async def atensor_shape(self, name: str) -> torch.Size:
        """Return the shape that `aread_tensor` would return.

        Raises:
            KeyError: If there is no such name.
            CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
            ReadError: If the storage failed.
        """
        async with self._contents.use() as session:
            [stored] = await self._contents.find(session, [name])
        return torch.Size(stored.shape)

    async def atensor_dtype(self, name: str) -> torch.dtype:
        """Return the dtype that `aread_tensor` would return; raises what `atensor_shape` does."""
        async with self._contents.use() as session:
            [stored] = await self._contents.find(session, [name])
        return torch_dtype(self._path, stored)

    async def aread_tensor(self, name: str) -> Tensor:
        """Read all of a tensor into memory of its own; raises what `atensor_shape` does."""
        async with self._contents.use() as session:
            found = await self._contents.find(session, [name])
            return (await read_stored(session, found))[name]

    async def aread_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Read the rows `[begin, end)` of a tensor, so that it need not fit into memory.

        The first dimension counts the rows.

        Raises:
            ValueError: If not all of these rows are there, or the tensor is a scalar.
            KeyError: If there is no such name.
            CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
            ReadError: If the storage failed.
        """
        first, last = operator.index(begin), operator.index(end)
        async with self._contents.use() as session:
            [stored] = await self._contents.find(session, [name])
            return (await read_stored(session, [stored.window(first, last)]))[name]

    def tensor_names(self) -> list[str]:
        """Return all names; see `atensor_names`."""
        return run_blocking(self.atensor_names)

    def tensor_shape(self, name: str) -> torch.Size:
        """Return a tensor's shape; see `atensor_shape`."""
        return run_blocking(partial(self.atensor_shape, name))

    def tensor_dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype; see `atensor_dtype`."""
        return run_blocking(partial(self.atensor_dtype, name))

    def read_tensor(self, name: str) -> Tensor:
        """Read a tensor; see `aread_tensor`."""
        return run_blocking(partial(self.aread_tensor, name))

    def read_rows(self, name: str, begin: int, end: int) -> Tensor:
        """Read some rows of a tensor; see `aread_rows`."""
        return run_blocking(partial(self.aread_rows, name, begin, end))


async def aload_tensors(
    checkpoint_path: Source,
    names: Iterable[str] | None = None,
    *,
    options: ReadOptions | None = None,
    **read: Unpack[ReadKeywords],
) -> dict[str, Tensor]:
    """Read tensors into memory of their own, on the caller's event loop.

    Args:
        checkpoint_path: A folder that holds `index`; a safetensors file; or a folder of these, as
            Hugging Face's are.
        names: The tensors to read, in the order of the result; a slot of a table is `table@slot`,
            its ids are `table@id`. Without names, all dense tensors, in the checkpoint's order.
        options: How to read.
        **read: Fields of `ReadOptions`, which go before `options`.

    Returns:
        The tensors by name.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument makes no sense.
        KeyError: If there are no such names; it lists all of them.
        CheckpointError: If the checkpoint is missing, unreadable, or contradicts itself.
        ReadError: If the storage failed.
    """
    path, how = ReadOptions.of(options, read).at(checkpoint_path, "checkpoint_path")
    if isinstance(names, str):
        raise TypeError(f"names are several, got one text; write [{names!r}]")
    wanted = None if names is None else tuple(names)
    contents = Contents(path, how)
    async with contents.use() as session:
        if wanted is None:
            wanted = tuple((await contents.catalog(session)).whole().tensors)
        return await read_stored(session, await contents.find(session, wanted))


def load_tensors(
    checkpoint_path: Source,
    names: Iterable[str] | None = None,
    *,
    options: ReadOptions | None = None,
    **read: Unpack[ReadKeywords],
) -> dict[str, Tensor]:
    """Read tensors into memory of their own; see `aload_tensors`."""
    return run_blocking(partial(aload_tensors, checkpoint_path, names, options=options, **read))
