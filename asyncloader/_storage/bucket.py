"""A bucket of an object store, and its clients, by obstore."""

from __future__ import annotations

import errno
from functools import cached_property
from typing import TYPE_CHECKING, Any

from asyncloader._addresses import HTTP

from .stores import open_store
from .uploads import PART, PartMemory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obstore import PutMode
    from obstore.store import ObjectStore

    from asyncloader._addresses import Address


_READ_BYTES = 8 << 20
_RETRIES = 5
_SPARE_PARTS = 4


class Bucket:
    """A bucket, a container or a server; made in no time, its client when it is first asked.

    Args:
        address: Of anything in it.
        options: As `open_store` takes them.
        uploads: Objects that are written at a time.

    Attributes:
        memory: Of all uploads, 8 MiB for each of them, and 32 MiB more.
    """

    def __init__(
        self, address: Address, options: Mapping[str, Any] | None, *, uploads: int = 1
    ) -> None:
        self._address = address
        self._options = options
        self.memory = PartMemory(uploads + _SPARE_PARTS)

    @cached_property
    def client(self) -> ObjectStore:
        """The client of obstore, which tries again by itself."""
        return open_store(self._address, self._options, read_bytes=_READ_BYTES, retries=_RETRIES)

    def put_once(self, key: str, data: bytes, mode: PutMode) -> str:
        """Write an object, and return its ETag. Tried once: of two tries one would be refused.

        Raises:
            FileExistsError: If the condition does not hold.
        """
        client = self._trying_once  # says it if obstore is not there
        import obstore  # noqa: PLC0415  # an extra

        try:
            result = obstore.put(client, key, data, mode=mode)
        except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError) as no:
            raise FileExistsError(errno.EEXIST, "written to by another", key) from no
        return str(result["e_tag"]).strip('"')

    @cached_property
    def _trying_once(self) -> ObjectStore:
        return open_store(self._address, self._options, read_bytes=_READ_BYTES, retries=None)

    @cached_property
    def uploading(self) -> ObjectStore:
        """The client of uploads, which share a link: its requests may take longer."""
        nbytes = self.memory.parts * PART
        return open_store(self._address, self._options, read_bytes=nbytes, retries=_RETRIES)

    @property
    def lists(self) -> bool:
        """Whether it tells which objects there are: few servers of HTTP do, by WebDAV."""
        return self._address.store != HTTP
