"""Addresses of checkpoints in object stores."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Two letters at least: one is a drive.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")
_LOCAL = "file"
# Ends of a key that is taken for one file; all else is a folder.
FILES = (".safetensors", ".safetensors.index.json", ".pt", ".pth", ".bin")
S3, GCS, AZURE, HTTP = "S3", "Google Cloud Storage", "Azure", "HTTP"
_STORES = {
    **dict.fromkeys(["s3", "s3a"], S3),
    "gs": GCS,
    **dict.fromkeys(["az", "abfs", "abfss"], AZURE),
    **dict.fromkeys(["http", "https"], HTTP),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a checkpoint lies in an object store.

    Attributes:
        url: As it was given, without a slash at its end.
        store: The kind of store, by its name in messages.
        root: The bucket or container; of HTTP, the server's URL.
        key: What all keys of the checkpoint begin with; without a slash at either end.
        account: Azure's storage account, if the URL names it.
    """

    url: str
    store: str
    root: str
    key: str
    account: str = ""


def is_url(path: str) -> bool:
    """Say whether a path is an address in an object store."""
    return _URL.match(path) is not None


def as_path(location: str) -> Path | str:
    """Return a path as users take it; a URL stays text, or one of its slashes would be lost."""
    return location if is_url(location) else Path(location)


def local_path(text: str, name: str) -> str:
    """Return the path of a `file://` URL, and any other text as it is.

    Raises:
        ValueError: If the URL names another machine.
    """
    found = _URL.match(text)
    if found is None or found[1].lower() != _LOCAL:
        return text
    parts = urlsplit(text)
    if parts.netloc not in {"", "localhost"} or not parts.path:
        raise ValueError(f"{name}: {text!r} names no local file: write file:///folder/…")
    return unquote(parts.path)


def address_of(text: str, name: str) -> Address:
    """Return what a URL names.

    Raises:
        ValueError: If it is of an unknown kind, or names no bucket, or holds a secret.
    """
    parts = urlsplit(text)
    scheme = parts.scheme.lower()
    if scheme not in _STORES:
        known = ", ".join(f"{one}://" for one in (*_STORES, _LOCAL))
        raise ValueError(f"{name} is a URL of an unknown kind, {scheme}://; known are {known}")
    if not text[len(scheme) + 1 :].startswith("//"):
        raise ValueError(
            f"{name} is a URL whose second slash is gone, {scheme}:/…: give it as text, no Path"
        )
    store = _STORES[scheme]
    if parts.query or parts.fragment or parts.password or (parts.username and store != AZURE):
        # Not the URL itself: what stands there may be a secret.
        raise ValueError(
            f"{name} is a URL with a query, a fragment or a password, which would stand in logs; "
            "give credentials by storage_options, or as the cloud's own tools take them"
        )
    if not parts.netloc:
        raise ValueError(f"{name}: {text!r} names no bucket: write {scheme}://bucket/…")
    key = "/".join(part for part in parts.path.split("/") if part)
    if {".", ".."} & {*key.split("/")}:
        raise ValueError(f"{name}: {text!r} has '.' or '..' in it: keys of objects have no parents")
    root, account = parts.netloc, ""
    if store == HTTP:
        root, key = f"{scheme}://{parts.netloc}", unquote(key)
    elif store == AZURE and parts.username:  # container@account.dfs.core.windows.net
        root, account = parts.username, (parts.hostname or "").partition(".")[0]
    return Address(url=text.rstrip("/"), store=store, root=root, key=key, account=account)
