r"""Reads the JSON of files that may be hostile. Text in, an object or a `BadJsonError` out.

Stricter than orjson, and bounded.

- A key may stand twice in an object. Of its values orjson keeps the last, other readers the first:
  a reader may load a value that another one has not checked. `{"a": 1, "a": 2}` has two colons and
  becomes one member. So colons are counted in the text, and members in the object. A name with a
  colon would spoil the count, so there are three counts, the cheap ones first: all colons; colons
  behind a quote or a space, of which `{"kernel:0": 1}` has one; colons outside of strings, of which
  `{"a\":": 1}` has one.
- Objects take up to 30 times the room of their text. How much they can take is computed from the
  brackets and colons of the text, before an object is made.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import orjson

from asyncloader.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from numpy.typing import NDArray


Text: TypeAlias = bytes | bytearray

# Bytes of an object, a list and a member with its key, while orjson parses: measured. Numbers and
# text take no more than 22 times their length.
_OBJECT, _LIST, _MEMBER = 232, 88, 112
# The bytes that all objects may take. A header of tensors with short names takes so many for each
# byte of text; small files need some room on top.
_ROOM_PER_BYTE = 16
_ROOM = 32 << 20
_SMALL = 1 << 20
_STEP = 1 << 16  # stays in a processor's cache
_QUOTE = ord('"')
_STRING = re.compile(rb'"[^"]*"')
# With a sign before it that may stand before a number, and none behind it that goes on with it.
_NEGATIVE_ZERO = re.compile(rb"-0(?<=[:,[\s]-0)(?![.eE0-9])")


class BadJsonError(ValueError):
    """The text is no such object; `key` is the key to blame, if there is one."""

    def __init__(self, problem: str, key: str | None = None) -> None:
        super().__init__(problem)
        self.key = key


def parse_object(text: Text, expected: Callable[[dict[str, Any]], int]) -> dict[str, Any]:
    """Read an object in which no key stands twice, nor in any object within.

    Args:
        text: UTF-8.
        expected: Counts the members of the object and of the objects within, provided that the
            object has the right form. It may count too few; if it counted too many, a key that
            stands twice could be missed.

    Raises:
        BadJsonError: If it is not JSON, no object, has a key twice, or would take too much memory.
    """
    array = np.frombuffer(text, np.uint8)
    colons = _count(array, ":")
    _check_room(text, colons)
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise BadJsonError(f"is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise BadJsonError("is not a JSON object")
    count = expected(value)
    if count == colons or count == _count_members(array):
        return value
    if _count_outside(text)[":"] != _members_of(value):
        raise _doubled(text)
    return value


def has_negative_zero(text: Text) -> bool:
    """Say whether a number is `-0`: 0 to orjson, but a float to safetensors, which refuses it."""
    if not _count(np.frombuffer(text, np.uint8), "-") or not _NEGATIVE_ZERO.search(text):
        return False  # as in `layer-0`
    return _NEGATIVE_ZERO.search(_STRING.sub(b"", _unescaped(text))) is not None


def _unescaped(text: Text) -> bytes:
    """Return the text without escaped characters: each quote then begins or ends a string."""
    return bytes(text).replace(b"\\\\", b"").replace(b'\\"', b"")


def _count_outside(text: Text) -> dict[str, int]:
    """Count brackets and colons outside of strings."""
    array, inside = np.frombuffer(_unescaped(text), np.uint8), 0
    counts = dict.fromkeys("{[:", 0)
    for step in range(0, len(array), _STEP):
        block = array[step : step + _STEP]
        parity = np.bitwise_xor.accumulate((block == _QUOTE).view(np.uint8)) ^ inside
        inside = int(parity[-1])
        outside = block[parity == 0]
        for sign in counts:
            counts[sign] += int(np.count_nonzero(outside == ord(sign)))
    return counts


def _count(array: NDArray[np.uint8], character: str) -> int:
    code, steps = ord(character), range(0, len(array), _STEP)
    return sum(int(np.count_nonzero(array[step : step + _STEP] == code)) for step in steps)


def _count_members(array: NDArray[np.uint8]) -> int:
    """Count colons as they stand behind keys: names like `kernel:0` have others."""
    at = np.flatnonzero(array[1:] == ord(":"))
    before = array[at]
    return int(np.count_nonzero((before == _QUOTE) | (before <= ord(" "))))


def _members_of(value: object) -> int:
    """Count the members of all objects."""
    count, left = 0, [value]
    while left:
        here = left.pop()
        if isinstance(here, dict):
            count += len(here)
            left += [one for one in here.values() if isinstance(one, dict | list)]
        elif isinstance(here, list):
            left += [one for one in here if isinstance(one, dict | list)]
    return count


def _check_room(text: Text, colons: int) -> None:
    if len(text) <= _SMALL:
        return
    most = _ROOM + _ROOM_PER_BYTE * len(text)
    array = np.frombuffer(text, np.uint8)
    counts = {"{": _count(array, "{"), "[": _count(array, "["), ":": colons}
    if _room_of(counts) <= most or _room_of(_count_outside(text)) <= most:
        return  # a name may be full of brackets
    raise BadJsonError(
        f"is {len(text)} bytes that are mostly brackets: as objects they would take more than "
        f"{most} bytes"
    )


def _room_of(counts: Mapping[str, int]) -> int:
    return _OBJECT * counts["{"] + _LIST * counts["["] + _MEMBER * counts[":"]


class _DoubledError(Exception):
    """Its text is a key."""


def _doubled(text: Text) -> BadJsonError:
    """Find a key that stands twice in one object."""
    try:
        json.loads(str(text, "utf-8"), object_pairs_hook=_look, parse_int=len, parse_float=len)
    except _DoubledError as error:
        key = str(error)
        return BadJsonError(f"has the key {key[:200]!r} twice in one object", key)
    except RecursionError:
        pass
    return BadJsonError("has a key twice in one object")


def _look(pairs: list[tuple[str, object]]) -> None:
    """Raise if a key comes again."""
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise _DoubledError(key)
        seen.add(key)


def object_in(
    location: str, name: str, text: Text, expected: Callable[[Mapping[str, object]], int]
) -> dict[str, object]:
    """Return the JSON object that the file `name` holds; for `expected` see `parse_object`."""
    try:
        return parse_object(text, expected)
    except BadJsonError as error:
        raise CheckpointError(location, str(error), name, error.key) from error


def members_of_objects(value: Mapping[str, object]) -> int:
    """Count the members of an object, and of the objects in it."""
    return len(value) + sum(len(one) for one in value.values() if isinstance(one, dict))
