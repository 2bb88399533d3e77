"""Opens folders, wherever they lie."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asyncloader._addresses import address_of, is_url

from .bucket import Bucket
from .bucket_folder import BucketFolder
from .local_folder import LocalFolder

if TYPE_CHECKING:
    from collections.abc import Mapping


class Folders:
    """Opens folders by path or URL, with one client for each bucket.

    Args:
        storage_options: Of URLs, as `ReadOptions` has them.
        uploads: Objects of a bucket that are written at a time.
    """

    def __init__(
        self, storage_options: Mapping[str, Any] | None = None, *, uploads: int = 1
    ) -> None:
        self._options = storage_options
        self._uploads = uploads
        self._buckets: dict[tuple[str, str, str], Bucket] = {}

    def at(self, location: str) -> LocalFolder | BucketFolder:
        """Return a folder, which need not be there. Looks at nothing yet.

        Raises:
            ValueError: If it is a URL that names nothing.
        """
        if not is_url(location):
            return LocalFolder(location)
        address = address_of(location, "path")
        which = (address.store, address.root, address.account)
        bucket = self._buckets.setdefault(
            which, Bucket(address, self._options, uploads=self._uploads)
        )
        return BucketFolder(bucket, address.url, address.key)
