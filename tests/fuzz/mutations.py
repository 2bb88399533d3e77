"""What is done to a good checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from .trees import Members, Node, copied, rendered, slots

if TYPE_CHECKING:
    from collections.abc import Callable

    from .choices import Choices
    from .trees import Slot

NESTED = 1100  # deeper than parsers go
HOSTILE = [
    "0", "1", "-1", "-0", "2", "4", "8", "12", "16", "1.0", "8.0", "-0.0", "0e0", "1e0", "1E2",
    "1e400", "-1e400", "1e-400", "4294967296", "4611686018427387904", "9223372036854775807",
    "9223372036854775808", "18446744073709551615", "18446744073709551616", "-9223372036854775808",
    "-9223372036854775809", "9" * 400, "9" * 5000, "01", "+1", ".5", "1.", "0x1", "true", "false",
    "null", "nul", "NaN", "Infinity", "-Infinity", '""', '"a"', '"0"', "'a'", '"\\ud800"',
    '"\\ud83d\\ude00"', '"\\u0000"', '"\x00"', '"\n"', '"\x7f"', '"\\x"', '"..', '".."', '"."',
    '"../outside"', '"/etc/passwd"', '"a\\/b"', '"a\\\\b"', '"a:b"', '":"', '" :"', '"-0"', '"[,{"',
    '"\\""', '"w^ "', '"t@id^0@1@1"', '"t@id^00000@65536@65536"', '"@^0@1@1"',
    '"t@embedding^0@0@1"', '"index"', '"asyncloader.json"', '"F32"', '"bool"', '"BOOL"', '"U8"',
    '"F4"', '"F6_E3M2"', '"F31"', '"F8_E8M0"', '"C64"', '"f32"', "[]", "{}", "[0,8]", "[8,8]",
    "[0]", "[[]]",
    '{"a":1}', '{"a":1,"a":2}',
    '{"":{},"":[]}', "[" * NESTED + "]" * NESTED, '{"a":' * NESTED + "1" + "}" * NESTED,
    "[" * 200 + "]" * 200, "[" + ",".join(["1"] * 100) + "]", "[9223372036854775807,0]",
    "[0,4611686018427387904,4611686018427387904]", "[4611686018427387904,4,0]",
]  # fmt: skip
KEYS = [
    "", "a", "w^ ", "w", "v^ ", "t.id/part_0_1", "dtype", "shape", "data_offsets", "__metadata__",
    "file_index", "block_index", "weight_map", "format", "..", "../outside", "/etc/passwd", "a/b",
    "a\\b", "a\0b", "a:b", ":", "-0", "\U0001f600", "x/part_0^ ", "index", ".", "x" * 300, "é",
]  # fmt: skip
DELTAS = [1, -1, 2, -2, 4, 8, -8, 2**31, 2**32, 2**63, -(2**63)]
PIECES = [
    b"\xef\xbb\xbf", b"\0", b"\xff", b"\xed\xa0\x80", b"\xc0\x80", b" ", b"\n", b"\t", b"\r",
    b"\x0b", b'"', b",", b":", b"[", b"]", b"{", b"}", b"\\", b"-", b"0", b"e", b"/", b"\xc2\xa0",
]  # fmt: skip


def change_tree(root: list[Any], choices: Choices) -> None:
    """Change one thing in a JSON document, the only node of `root`."""
    found = list(slots(root))
    choices.of(_CHANGES)(found, choices)


def _replace(found: list[Slot], choices: Choices) -> None:
    choices.of(found).put(choices.of(HOSTILE))


def _splice(found: list[Slot], choices: Choices) -> None:
    choices.of(found).put(copied(choices.of(found).node))


def _swap(found: list[Slot], choices: Choices) -> None:
    one, other = choices.of(found), choices.of(found)
    first, second = copied(one.node), copied(other.node)
    one.put(second)
    other.put(first)


def _wrap(found: list[Slot], choices: Choices) -> None:
    slot = choices.of(found)
    slot.put([slot.node] if choices.below(2) else Members([['"a"', slot.node]]))


def _tweak(found: list[Slot], choices: Choices) -> None:
    numbers = [slot for slot in found if isinstance(slot.node, str) and slot.node.isdecimal()]
    if numbers:
        slot = choices.of(numbers)
        slot.put(str(int(str(slot.node)[:400]) + choices.of(DELTAS)))


def _respell(found: list[Slot], choices: Choices) -> None:
    """Write the same number in another way; all that are the same, perhaps."""
    numbers = [slot for slot in found if isinstance(slot.node, str) and slot.node.isdecimal()]
    if numbers:
        before = choices.of(numbers).node
        after = choices.of(["-{}", "{}.0", "{}e0", "0{}", "{}E+0", '"{}"', "[{}]"]).format(before)
        same = [slot for slot in numbers if slot.node == before]
        for slot in same if choices.below(2) else [choices.of(same)]:
            slot.put(after)


def _inflate(found: list[Slot], choices: Choices) -> None:
    """Give something that is empty immense sizes."""
    shapes = [slot.node for slot in found if isinstance(slot.node, list) and "0" in slot.node]
    if shapes:
        shape: list[Any] = choices.of(shapes)
        for _ in range(1 + choices.below(3)):
            shape.insert(choices.below(len(shape) + 1), choices.of(_IMMENSE))


def _double(found: list[Slot], choices: Choices) -> None:
    members = _some_members(found, choices)
    if members:
        key, node = choices.of(members)
        if choices.below(2) and len(key) > len('""') and key[1] not in '\\"':
            key = f'"\\u{ord(key[1]):04x}{key[2:]}' if ord(key[1]) < 1 << 16 else key
        again = choices.of(HOSTILE) if choices.below(2) else copied(node)
        members.insert(choices.below(len(members) + 1), [key, again])


def _delete(found: list[Slot], choices: Choices) -> None:
    lists = [slot.node for slot in found if isinstance(slot.node, list) and slot.node]
    if lists:
        here = choices.of(lists)
        assert isinstance(here, list)
        here.pop(choices.below(len(here)))


def _rename(found: list[Slot], choices: Choices) -> None:
    members = _some_members(found, choices)
    if members:
        choices.of(members)[0] = json.dumps(choices.of(KEYS))


def _insert(found: list[Slot], choices: Choices) -> None:
    lists = [slot.node for slot in found if isinstance(slot.node, list)]
    if lists:
        here = choices.of(lists)
        node: Any = choices.of(HOSTILE) if choices.below(2) else copied(choices.of(found).node)
        assert isinstance(here, list)
        item = [json.dumps(choices.of(KEYS)), node] if isinstance(here, Members) else node
        here.insert(choices.below(len(here) + 1), item)


def _shuffle(found: list[Slot], choices: Choices) -> None:
    lists = [slot.node for slot in found if isinstance(slot.node, list)]
    if lists:
        here = choices.of(lists)
        assert isinstance(here, list)
        here.reverse()


def _some_members(found: list[Slot], choices: Choices) -> Members | None:
    objects = [slot.node for slot in found if isinstance(slot.node, Members) and slot.node]
    return choices.of(objects) if objects else None


_CHANGES: list[Callable[[list[Slot], Choices], None]] = [
    _replace, _replace, _tweak, _tweak, _double, _delete, _rename, _insert, _splice, _swap, _wrap,
    _shuffle, _respell, _inflate,
]  # fmt: skip
_IMMENSE = ["4294967296", "4611686018427387904", "9223372036854775807", "3", "9223372036854775808"]

_HOW_MANY = [0, 1, 1, 1, 1, 2, 2, 3]
_SPACES = ["", "", "", " ", "\n\t", "\r"]


def change_bytes(content: bytes, choices: Choices) -> bytes:
    """Change some bytes of a file."""
    at, kind = choices.below(len(content) + 1), choices.below(6)
    length = 1 + choices.below(8)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + choices.of(PIECES) + content[at:]
    if kind == 2:
        return content[:at] + content[at + length :]
    if kind == 3:
        return content[:at] + content[at : at + length] + content[at:]
    if kind == 4:
        return content + bytes([choices.below(256)]) * length
    return content[:at] + bytes([choices.below(256)]) + content[at + 1 :]


def hostile_text(document: Node, choices: Choices) -> bytes:
    """Return a document with up to three things changed in it, and perhaps some bytes."""
    root = [copied(document)]
    for _ in range(choices.of(_HOW_MANY)):
        change_tree(root, choices)
    space = choices.of(_SPACES)
    node: Node = root[0]
    text = rendered(node, space).encode("utf-8", "surrogatepass")
    return change_bytes(text, choices) if choices.once_in(4) else text
