"""JSON as it stands, also where it says what no parser would: a key twice, `-0`, `1e400`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

Node: TypeAlias = "str | list[Any] | Members"
"""A scalar's text, a list of nodes, or an object."""


class Members(list[list[Any]]):
    """An object: `[key as it stands, node]`, in order."""


class Slot(NamedTuple):
    """Where a node is: `home[at]`."""

    home: list[Any]
    at: int

    @property
    def node(self) -> Node:
        found: Node = self.home[self.at]
        return found

    def put(self, node: Node) -> None:
        self.home[self.at] = node


def tree(value: object) -> Node:
    """Return a value as a tree."""
    if isinstance(value, dict):
        return Members([json.dumps(key), tree(one)] for key, one in value.items())
    if isinstance(value, list | tuple):
        return [tree(one) for one in value]
    return json.dumps(value)


def copied(node: Node) -> Node:
    """Return a copy that shares nothing that can change."""
    if isinstance(node, Members):
        return Members([key, copied(one)] for key, one in node)
    if isinstance(node, list):
        return [copied(one) for one in node]
    return node


def rendered(node: Node, space: str = "") -> str:
    """Return the text; `space` stands around every sign."""
    if isinstance(node, str):
        return node
    if isinstance(node, Members):
        inner = f",{space}".join(f"{key}{space}:{space}{rendered(one, space)}" for key, one in node)
        return f"{{{space}{inner}{space}}}"
    inner = f",{space}".join(rendered(one, space) for one in node)
    return f"[{space}{inner}{space}]"


def slots(root: list[Any]) -> Iterator[Slot]:
    """Yield all nodes within; `root` is a list that holds the outermost one."""
    left: list[Slot] = [Slot(root, at) for at in range(len(root))]
    while left:
        slot = left.pop()
        yield slot
        node = slot.node
        if isinstance(node, Members):
            left += [Slot(member, 1) for member in node]
        elif isinstance(node, list):
            left += [Slot(node, at) for at in range(len(node))]
