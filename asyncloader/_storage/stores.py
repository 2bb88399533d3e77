"""Clients of object stores, by obstore."""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from asyncloader._addresses import AZURE, GCS, S3
from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from obstore import ObjectMeta
    from obstore.store import ObjectStore

    from asyncloader._addresses import Address


# Also those of the environment.
_ENDPOINT = re.compile(
    r"((aws|azure|azure_storage)_)?endpoint(_url)?(_s3)?|((google|gcs)_)?base_url", re.IGNORECASE
)
_SETTINGS = ("client_options", "retry_config", "credential_provider")
_RETRY_SETTINGS = {"backoff", "max_retries", "retry_timeout"}
_SLOWEST = 1e6  # bytes a second: a link on which a request still ends in time
_SECONDS = 30


def open_store(
    address: Address, options: Mapping[str, Any] | None, *, read_bytes: int, retries: int | None = 0
) -> ObjectStore:
    """Return the client of an address.

    Args:
        address: Where.
        options: obstore's own: names of its configuration, and `client_options`, `retry_config`
            and `credential_provider`.
        read_bytes: The largest read: a request may take longer than obstore's 30 seconds.
        retries: How often obstore tries again, unless options say otherwise: 0 for what we try
            again, and count, ourselves. `None` is never, whatever they say.

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
    _check_endpoints(address, config)
    if unknown := {*config.get("retry_config", {})} - _RETRY_SETTINGS:
        names, known = (", ".join(sorted(one)) for one in (unknown, _RETRY_SETTINGS))
        raise ValueError(f"{address.url}: retry_config has no {names}, but {known}")
    given: dict[str, Any] = {name: config.pop(name) for name in _SETTINGS if name in config}
    _set_times(given, max(_SECONDS, round(read_bytes / _SLOWEST)), retries)
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


def _set_times(given: dict[str, Any], seconds: int, retries: int | None) -> None:
    """Say how long a request may take, and how often it is tried, where the user does not."""
    # Whoever names an endpoint of http:// wants it.
    client: dict[str, object] = {
        "allow_http": True,
        "timeout": f"{seconds}s",
        "read_timeout": f"{_SECONDS}s",
    }
    given["client_options"] = client | dict(given.get("client_options", {}))
    again = {"max_retries": retries or 0, "retry_timeout": timedelta(seconds=3 * seconds)}
    given["retry_config"] = again | dict(given.get("retry_config", {}))
    if retries is None:
        given["retry_config"]["max_retries"] = 0


def _check_endpoints(address: Address, config: Mapping[str, Any]) -> None:
    """Refuse what obstore would panic at."""
    for name, value in (*config.items(), *os.environ.items()):
        if _ENDPOINT.fullmatch(name) and "://" not in str(value):
            problem = f"{name}={value!r} is no URL: write http://… or https://…"
            raise ValueError(f"{address.url}: {problem}")


def identity_of(meta: ObjectMeta) -> tuple[object, ...]:
    """Return what changes when another object takes a key."""
    tag = meta["e_tag"]
    return meta["size"], tag, None if tag else meta["last_modified"]
