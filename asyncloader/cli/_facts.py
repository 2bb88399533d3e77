"""Facts about a checkpoint that are the same in several views."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.text import Text

from asyncloader._display import escaped, size_text

from ._terminal import SHOWN, count, plural

if TYPE_CHECKING:
    from collections.abc import Mapping

    from asyncloader._tools.beside import Beside

    from ._terminal import Fact

_LONGEST = 200
_IO_STATE = "io_state_"
_FEW = 3


def beside_facts(beside: Beside) -> list[Fact]:
    """Show what a trainer saved beside the tensors; the files of many ranks as one."""
    if not beside.files:
        return []
    ranks = [file for file in beside.files if file.name.startswith(_IO_STATE)]
    single = [file for file in beside.files if file not in ranks or len(ranks) <= _FEW]
    texts = [f"{file.name} ({size_text(file.bytes)})" for file in single]
    if len(ranks) > _FEW:
        size = size_text(sum(file.bytes for file in ranks))
        texts.append(f"{_IO_STATE}….pt of {plural(len(ranks), 'rank')} ({size})")
    lines: list[Fact] = [("beside", Text(escaped(", ".join(texts)), overflow="fold"))]
    if beside.global_step is not None:
        lines.append(("global step", count(beside.global_step)))
    return lines


def metadata_facts(metadata: Mapping[str, Mapping[str, str]]) -> list[Fact]:
    """Show the free text of headers: once, where all files have the same."""
    if not metadata:
        return []
    first, *others = metadata.items()
    same = all(other == first[1] for _, other in others)
    texts = [
        f"{key}: {value}" if same else f"{file}: {key}: {value}"
        for file, pairs in ([first] if same else metadata.items())
        for key, value in pairs.items()
    ]
    rest = [f"and {count(len(texts) - SHOWN)} more; --json has them"] * (len(texts) > SHOWN)
    cut = map(_cut, map(escaped, texts[:SHOWN] + rest))
    return [("metadata", Text(one, overflow="fold")) for one in cut]


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"
