"""How a checkpoint is read: one checked set of options for loads, readers and tools."""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias, TypedDict, get_args

from ._arguments import (
    check_callable,
    check_count,
    check_storage_options,
    check_switch,
    check_timeout,
    checked_path,
)
from ._ready_stores import source_of

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping

    from ._ready_stores import Source

__all__ = ["LoadKeywords", "ReadKeywords", "ReadOptions", "Verify"]

Verify: TypeAlias = Literal["auto", "require", "off"]

# For a load with `max_loop_lag` or `pressure`: a job that has begun is not interrupted.
_PROMISED_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How `Loader`, `CheckpointReader`, `load_tensors` and the tools read a checkpoint.

    Each of them takes the same fields as keyword arguments, too; a keyword goes before `options`.

    ```python
    options = ReadOptions(verify="require", max_loop_lag=0.02)
    await Loader(path, tables, tensors, options=options).aload()
    ```

    Attributes:
        parallel: Reads in flight, as far as `max_inflight_bytes` has room for them.
        chunk_bytes: The largest read, in bytes. Cancelling waits for one such read.
        max_inflight_bytes: Memory for reads in flight, in bytes, besides the destinations' own.
        verify: Whether bytes are compared with the digests that `Saver` wrote. `"auto"`: if the
            checkpoint has digests, each chunk of 8 MiB that is read as a whole is compared.
            `"require"`: every loaded byte is compared, and a checkpoint without digests is an
            error. `"off"`: none. With digests, at least one chunk is read at a time. A `LoadReport`
            says how many bytes were verified.
        timeout: Seconds after which a load, or another call that reads, is given up; `None` waits
            for ever. Giving up waits for a read in flight, but no longer than `stall_timeout`.
        stall_timeout: Seconds that one read may take, from when the system gets it, before the call
            fails with `ReadStalledError`; `None` waits for ever. A read of a disk that is gone
            cannot be interrupted: its thread is left behind, with the memory that the thread may
            yet write to; the event loop and other loads go on.
        direct_io: Whether files are read past the page cache (`O_DIRECT`), if the file system
            allows it. `"auto"`: large reads of what is not in the cache, as long as no other load
            reads the same checkpoint; several at a time share the cache. True: all, which is
            slower for files that are in the cache; others stay there. False: none, so that the
            cache has them for whoever reads them next. Past it, a read in flight takes 4 MiB of
            memory more.
        follow_symlinks: Whether a file of the checkpoint may be a symbolic link that leads out of
            its folder, as in the cache of Hugging Face. Then the author of the checkpoint chooses
            which files of this machine are read. (The path that you give may be a link anyway.)
        storage_options: Of a URL: how its store is reached, in obstore's own names (`endpoint`,
            `region`, `access_key_id`, …), with `client_options`, `retry_config` and
            `credential_provider`. What is not given comes from the environment, as each cloud's own
            tools take it. In no message and no `repr`.
        cache_dir: Of a URL: a folder of the local disk that keeps what is read, for the next loads,
            of this process or others; they ask the store only whether an object is still the same,
            and compare each MiB with its digest. It is made for this user alone.
        cache_bytes: The most that `cache_dir` holds, in bytes, about; what was not used for longest
            goes first. `None` leaves a tenth of the disk free.
        max_loop_lag: Seconds by which the reading may make the caller's event loop late. A timer on
            that loop is watched; while it is late, fewer threads read and index, with pauses.
            Chunks are at most 4 MiB then. `None` is full speed. The report's `lag` says how late
            the loop was.
        pressure: Called on the event loop twenty times a second. It returns, from metrics of the
            program, how little room there is for a load: 0 leaves the load the whole machine, 0.75
            a quarter of the processors, 1 nearly nothing (a tenth).

    Raises:
        TypeError: If a value is of the wrong type.
        ValueError: If a value makes no sense.
    """

    parallel: int = 16
    chunk_bytes: int = 16 << 20
    max_inflight_bytes: int = 128 << 20
    verify: Verify = "auto"
    timeout: float | None = None
    stall_timeout: float | None = 120.0
    direct_io: bool | Literal["auto"] = "auto"
    follow_symlinks: bool = False
    storage_options: Mapping[str, Any] | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    cache_bytes: int | None = None
    max_loop_lag: float | None = None
    pressure: Callable[[], float] | None = None

    def __post_init__(self) -> None:
        for name in ("parallel", "chunk_bytes", "max_inflight_bytes"):
            check_count(getattr(self, name), name)
        if self.verify not in get_args(Verify):
            known = ", ".join(map(repr, get_args(Verify)))
            raise ValueError(f"verify is one of {known}, got {self.verify!r}")
        for name in ("timeout", "stall_timeout", "max_loop_lag"):
            check_timeout(getattr(self, name), name)
        check_switch(self.direct_io, "direct_io", also="auto")
        check_switch(self.follow_symlinks, "follow_symlinks")
        check_storage_options(self.storage_options)
        if self.cache_dir is not None and not checked_path(self.cache_dir, "cache_dir"):
            raise ValueError("cache_dir is empty: name a folder")
        if self.cache_bytes is not None:
            check_count(self.cache_bytes, "cache_bytes")
            if self.cache_dir is None:
                raise ValueError("cache_bytes is given without cache_dir")
        if self.pressure is not None:
            check_callable(self.pressure, "pressure")

    @classmethod
    def of(cls, options: ReadOptions | None, keywords: Mapping[str, Any]) -> Self:
        """Return options with some fields replaced by keyword arguments.

        Args:
            options: The other fields; `None` is the defaults.
            keywords: Fields by name.

        Raises:
            TypeError: If there is no such field, or a value is of the wrong type.
            ValueError: If a value makes no sense.
        """
        if options is None:
            options = cls()
        if not isinstance(options, cls):
            raise TypeError(f"options must be ReadOptions or None, got {options!r}")
        names = [field.name for field in dataclasses.fields(cls)]
        for name in keywords:
            if name not in names:
                close = difflib.get_close_matches(name, names, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise TypeError(f"unexpected keyword argument {name!r}{hint}")
        return dataclasses.replace(options, **keywords)

    def at(self, source: Source, name: str) -> tuple[str, Self]:
        """Return a path or URL, checked, and these options; of a store, with its options.

        Raises:
            TypeError: If it is none of these.
            ValueError: If it makes no sense, or a store comes with `storage_options`.
        """
        text, storage = source_of(source, name, self.storage_options)
        return text, dataclasses.replace(self, storage_options=storage)

    @property
    def promises(self) -> bool:
        """Whether `max_loop_lag` or `pressure` is given."""
        return self.max_loop_lag is not None or self.pressure is not None

    @property
    def read_bytes(self) -> int:
        """The largest read, in bytes, by all options together."""
        most = _PROMISED_CHUNK_BYTES if self.promises else self.chunk_bytes
        return min(most, self.chunk_bytes, self.max_inflight_bytes)


class LoadKeywords(TypedDict, total=False):
    """The fields of `ReadOptions`, as keyword arguments of `Loader`, which names `parallel`."""

    chunk_bytes: int
    max_inflight_bytes: int
    verify: Verify
    timeout: float | None
    stall_timeout: float | None
    direct_io: bool | Literal["auto"]
    follow_symlinks: bool
    storage_options: Mapping[str, Any] | None
    cache_dir: str | os.PathLike[str] | None
    cache_bytes: int | None
    max_loop_lag: float | None
    pressure: Callable[[], float] | None


class ReadKeywords(LoadKeywords, total=False):
    """The fields of `ReadOptions`, as keyword arguments."""

    parallel: int
