"""obstore's stores in place of URLs: what they are made of is taken, and clients are made anew.

A client of ours waits for as long as a read takes, and what fails is tried again here: a store that
was made for something else need not, so its `retry_config` is left out.
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
    settings = {"client_options": store.client_options} if hasattr(store, "client_options") else {}
    if kind == "HTTPStore":
        return store.url, settings
    if kind not in _STORES:
        raise ValueError(f"{name}: no client but its own can read from this {kind}")
    scheme, bucket = _STORES[kind]
    found: dict[str, Any] = dict(store.config)
    if (root := found.pop(bucket, None)) is None:
        raise ValueError(f"{name}: the {kind} does not say which {bucket} it is of: name it")
    prefix = store.prefix or ""
    if {"?", "#"} & {*prefix}:
        raise ValueError(f"{name}: the {kind}'s prefix has '?' or '#' in it, which no URL can have")
    settings["credential_provider"] = store.credential_provider
    return f"{scheme}://{root}/{prefix}", found | {n: one for n, one in settings.items() if one}
