"""Takes `index` and `tensorkey.json` apart, entry by entry where something is wrong."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import orjson

from asyncloader._checkpoint.files import INDEX, TENSORKEY
from asyncloader._checkpoint.index import Catalog, parse_catalog
from asyncloader.errors import CheckpointError

from .sifting import Sifted, sift

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .findings import Findings


_PART = re.compile(r".+/part_[0-9]+_[0-9]+", re.DOTALL)

Sift = Sifted[object, Catalog]


def sift_catalog(
    location: str,
    index: bytes | bytearray | None,
    tensorkey: bytes | bytearray | None,
    findings: Findings,
) -> tuple[Sift, tuple[str, ...]]:
    """Read both files, as far as they can be read.

    Args:
        location: The checkpoint, for messages.
        index: The text; `None` if it could not be read.
        tensorkey: Likewise.
        findings: Receives what is wrong.

    Returns:
        The names, and the shard files that `index` names.
    """
    sparse = _tensorkey(location, tensorkey, findings)
    whole = None if index is None else _index(location, index, findings)
    if whole is None:
        return Sifted(None, {}, ()), ()
    files, blocks = whole
    numbers = _numbers(location, files, findings)
    sifted = sift(blocks, lambda part: _parse(location, numbers, part, sparse or {}))
    errors = [*sifted.errors]
    if sparse is not None:
        errors += _strays(location, {key: sparse[key] for key in sparse.keys() - blocks.keys()})
        _find_parts(blocks, sparse, findings)
    if index is not None and not errors and not findings.of("problem"):
        errors += _of_all(location, index, tensorkey or b"{}")
    for error in errors:
        findings.error(error)
    return Sifted(sifted.parsed, sifted.good, tuple(errors)), tuple(numbers.values())


def _of_all(
    location: str, index: bytes | bytearray, tensorkey: bytes | bytearray
) -> list[CheckpointError]:
    """Return what is wrong with texts of which no entry is: a key stands there twice."""
    try:
        parse_catalog(location, index, tensorkey)
    except CheckpointError as error:
        return [error]
    return []


def _index(
    location: str, text: bytes | bytearray, findings: Findings
) -> tuple[dict[str, object], dict[str, object]] | None:
    try:
        value = orjson.loads(text)
        files, blocks = value["file_index"], value["block_index"]
        if isinstance(files, dict) and isinstance(blocks, dict):
            return files, blocks
    except (ValueError, TypeError, KeyError):
        pass
    try:
        parse_catalog(location, text, b"{}")
    except CheckpointError as error:
        findings.error(error)
    return None


def _tensorkey(
    location: str, text: bytes | bytearray | None, findings: Findings
) -> dict[str, object] | None:
    if text is None:
        return None
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        value = None
    if isinstance(value, dict):
        return value
    try:
        parse_catalog(location, _render({}, {}), text)
    except CheckpointError as error:
        findings.error(error)
    return None


def _numbers(location: str, files: Mapping[str, object], findings: Findings) -> dict[object, str]:
    """Return the good entries of `file_index`, by number."""
    numbers: dict[object, str] = {}
    for name, number in files.items():
        try:
            parse_catalog(location, _render({name: number}, {}), b"{}")
        except CheckpointError as error:
            findings.error(error)
            continue
        if number in numbers:
            text = f"file_index gives {name!r} the number {number}, which {numbers[number]!r} has"
            findings.problem(text, file=INDEX)
        else:
            numbers[number] = name
    return numbers


def _parse(
    location: str,
    numbers: Mapping[object, str],
    blocks: Mapping[str, object],
    sparse: Mapping[str, object],
) -> Catalog:
    wanted = [number for number in blocks.values() if type(number) is int and number in numbers]
    files = {numbers[number]: number for number in wanted}
    names = {key: sparse[key] for key in blocks if key in sparse}
    return parse_catalog(location, _render(files, blocks), orjson.dumps(names))


def _render(files: Mapping[str, object], blocks: Mapping[str, object]) -> bytes:
    return orjson.dumps({"file_index": files, "block_index": blocks})


def _strays(location: str, names: Mapping[str, object]) -> list[CheckpointError]:
    """Return what is wrong with names of blocks that `index` does not know."""
    errors = []
    for key, name in names.items():
        try:
            parse_catalog(location, _render({}, {}), orjson.dumps({key: name}))
        except CheckpointError as error:
            errors.append(error)
    return errors


def _find_parts(
    blocks: Mapping[str, Any], sparse: Mapping[str, object], findings: Findings
) -> None:
    for key in blocks.keys() - sparse.keys():
        if _PART.fullmatch(key):  # dense keys end in "^ "
            findings.problem(
                f"looks like a rank's part of a table, but {TENSORKEY} does not say of which, so "
                "it is taken for a dense tensor",
                file=INDEX,
                name=key,
            )
