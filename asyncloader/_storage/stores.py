"""Clients of object stores, by obstore."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from asyncloader._addresses import AZURE, GCS, S3
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obstore.store import ObjectStore

    from asyncloader._addresses import Address


_SETTINGS = ("client_options", "retry_config", "credential_provider")
_SLOWEST = 1e6  # bytes a second: a link on which a request still ends in time
_SECONDS = 30


def open_store(
    address: Address, options: Mapping[str, Any] | None, *, read_bytes: int
) -> ObjectStore:
    """Return the client of an address.

    Args:
        address: Where.
        options: obstore's own: names of its configuration, and `client_options`, `retry_config`
            and `credential_provider`.
        read_bytes: The largest read: a request may take longer than obstore's 30 seconds.

    Raises:
        CheckpointError: If obstore is not installed.
        ValueError: If an option is unknown, or makes no sense.
    """
    try:
        from obstore import store as stores  # noqa: PLC0415  # an extra
        from obstore.exceptions import BaseError  # noqa: PLC0415
    except ImportError as error:
        problem = "lies in an object store, for which pip install 'asyncloader[cloud]'"
        raise CheckpointError(address.url, problem) from error
    config: Any = dict(options or {})
    given: dict[str, Any] = {name: config.pop(name) for name in _SETTINGS if name in config}
    seconds = max(_SECONDS, round(read_bytes / _SLOWEST))
    # Whoever names an endpoint of http:// wants it.
    client: dict[str, object] = {
        "allow_http": True,
        "timeout": f"{seconds}s",
        "read_timeout": f"{_SECONDS}s",
    }
    given["client_options"] = client | dict(given.get("client_options", {}))
    # Tried again, counted and told by ourselves.
    given["retry_config"] = {"max_retries": 0} | dict(given.get("retry_config", {}))
    try:
        if address.store == S3:
            return stores.S3Store(address.root, config=config, **given)
        if address.store == GCS:
            return stores.GCSStore(address.root, config=config, **given)
        if address.store == AZURE:
            if address.account:
                config.setdefault("account_name", address.account)
            return stores.AzureStore(address.root, config=config, **given)
        if config or "credential_provider" in given:
            raise ValueError(f"{address.url}: storage_options of HTTP are client_options alone")
        return stores.HTTPStore.from_url(address.root, **given)
    except BaseError as error:
        raise ValueError(f"{address.url}: {str(error).splitlines()[0]}") from None
