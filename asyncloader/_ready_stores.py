"""obstore's stores in place of URLs: what they are made of is taken, and clients are made anew.

A client of ours waits for as long as a read takes, and tries again what it may; a store that was
made for something else does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

from ._arguments import checked_source, checked_target

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    from obstore.store import ObjectStore

Source: TypeAlias = "str | os.PathLike[str] | ObjectStore"
Options: TypeAlias = "Mapping[str, Any] | None"

# The URL's scheme, and what the bucket is called in the configuration, by the class of the store.
_STORES = {
    "S3Store": ("s3", "bucket"),
    "GCSStore": ("gs", "bucket"),
    "AzureStore": ("az", "container_name"),
}
_SETTINGS = ("client_options", "retry_config", "credential_provider")


def source_of(source: Source, name: str, options: Options) -> tuple[str, Options]:
    """Return a path or a URL, checked, and the options of its store: those given, or the store's.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it makes no sense, or a store comes with options beside it.
    """
    text, options = _taken_apart(source, name, options)
    return checked_source(text, name), options


def target_of(target: Source, name: str, options: Options) -> tuple[str, Options]:
    """Return the same of a place that is written to."""
    text, options = _taken_apart(target, name, options)
    return checked_target(text, name), options


def _taken_apart(
    source: Source, name: str, options: Options
) -> tuple[str | os.PathLike[str], Options]:
    mine = [one for one in type(source).__mro__ if one.__module__.partition(".")[0] == "obstore"]
    if not mine:
        return source, options  # type: ignore[return-value]  # no store
    kind = mine[0].__name__
    store: Any = source
    if options is not None:
        raise ValueError(f"{name} is a store, which has options of its own: no storage_options")
    if kind == "LocalStore" and store.prefix is not None:
        return str(store.prefix), None
    if kind == "HTTPStore":
        return store.url, {"client_options": store.client_options or {}}
    if kind not in _STORES:
        raise ValueError(f"{name}: no client but its own can read from this {kind}")
    scheme, bucket = _STORES[kind]
    found: dict[str, Any] = dict(store.config)
    url = f"{scheme}://{found.pop(bucket)}/{store.prefix or ''}"
    given = {setting: getattr(store, setting) for setting in _SETTINGS}
    return url, found | {setting: one for setting, one in given.items() if one is not None}
