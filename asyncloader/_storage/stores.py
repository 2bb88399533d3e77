"""Clients of object stores, by obstore."""

from __future__ import annotations

import contextlib
import errno
import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from asyncloader._addresses import AZURE, GCS, S3
from asyncloader.errors import CheckpointError

from .opening import FileChangedError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from obstore import ObjectMeta
    from obstore.store import ObjectStore

    from asyncloader._addresses import Address


_SETTINGS = ("client_options", "retry_config", "credential_provider")
_SLOWEST = 1e6  # bytes a second: a link on which a request still ends in time
_SECONDS = 30
_CLIENTS = re.compile(r"status code: 4(?!08|25|29)\d\d")  # errors that stay
_UNTRUSTED = re.compile(r"InvalidCertificate\(\s*(\w+)")
# Of messages: what follows a URL's `?` may be a signature.
_QUERY = re.compile(r"\?[^\s)\"']*")
_LONGEST = 300


def open_store(
    address: Address, options: Mapping[str, Any] | None, *, read_bytes: int, retries: int = 0
) -> ObjectStore:
    """Return the client of an address.

    Args:
        address: Where.
        options: obstore's own: names of its configuration, and `client_options`, `retry_config`
            and `credential_provider`.
        read_bytes: The largest read: a request may take longer than obstore's 30 seconds.
        retries: How often obstore tries again; 0 for what we try again, and count, ourselves.

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
    again = {"max_retries": retries, "retry_timeout": timedelta(seconds=_SECONDS)}
    given["retry_config"] = again | dict(given.get("retry_config", {}))
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


def identity_of(meta: ObjectMeta) -> tuple[object, ...]:
    """Return what changes when another object takes a key."""
    tag = meta["e_tag"]
    return meta["size"], tag, None if tag else meta["last_modified"]


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Raise an `OSError` in place of what obstore raises; no secret of a URL is in it."""
    import obstore.exceptions as errors  # noqa: PLC0415  # an extra

    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "no such object", what) from error
    except errors.PreconditionError as error:
        raise FileChangedError(what.rpartition("/")[2]) from error
    except (errors.PermissionDeniedError, errors.UnauthenticatedError) as error:
        problem = f"refused; do the credentials allow reading it? ({_in_words(error)})"
        raise PermissionError(errno.EACCES, problem) from error
    except errors.NotSupportedError as error:
        raise OSError(errno.ENOTSUP, _in_words(error)) from error
    except errors.BaseError as error:
        if (why := _UNTRUSTED.search(str(error))) is not None:
            problem = f"the server's certificate is not trusted: {why[1]}"
            raise OSError(errno.EPROTO, problem) from error
        stays = _CLIENTS.search(str(error)) is not None
        raise OSError(errno.EPROTO if stays else errno.EIO, _in_words(error)) from error


def _in_words(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return _QUERY.sub("?…", lines[0])[:_LONGEST]
