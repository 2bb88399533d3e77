"""The parsers, against the strict reader: both refuse, or both find the same."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import SafetensorError, deserialize

from asyncloader import CheckpointError
from asyncloader._checkpoint.catalog import SHARDED
from asyncloader._checkpoint.dtypes import header_shape
from asyncloader._checkpoint.format import INDEX, SIDECAR, TENSORKEY
from asyncloader._checkpoint.index import Catalog, Places, parse_recis, parse_weight_map
from asyncloader._checkpoint.manifest import read_header
from asyncloader._storage.protocol import read_small
from tests.oracle.strict import (
    BITS,
    Refused,
    StrictBlock,
    StrictFolder,
    strict_header,
    strict_index,
    strict_weight_map,
)

from .choices import Choices
from .drafts import draft_of, shard_of, spoiled
from .trees import Members

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from asyncloader._checkpoint.header import ShardHeader
    from asyncloader._storage.protocol import ReadInto
from asyncloader._checkpoint.problems import Problems

__all__ = ["TARGETS", "header", "names", "weight_map"]

T = TypeVar("T")
WHERE = "here"
FILE = "file.safetensors"
LONGEST = 10_000


class Bytes:
    """A storage that never waits, so that no loop is needed."""

    location = WHERE
    lost = 0

    def __init__(self, content: bytes) -> None:
        self._content = content

    async def size(self, name: str, /) -> int:
        return len(self._content)

    async def changed(self, names: Sequence[str], /) -> list[str]:
        return []

    async def readinto(self, name: str, offset: int, views: Sequence[memoryview], /) -> int:
        done = 0
        for view in views:
            part = self._content[offset + done : offset + done + view.nbytes]
            view[: len(part)] = part
            done += len(part)
        return done

    async def on_thread(self, name: str, job: Callable[[ReadInto], T], /) -> T:
        raise AssertionError("a header takes no thread")


def at_once(coroutine: Coroutine[object, object, T]) -> T:
    """Run a coroutine that never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("it waits")


def judged(strict: Callable[[], T]) -> T | None:
    """Return what the strict reader finds; `None` if it refuses."""
    try:
        return strict()
    except Refused:
        return None


def ours(read: Callable[[], T]) -> T | None:
    """Return what we find; `None` if we refuse. Whatever else is raised is a bug."""
    try:
        return read()
    except CheckpointError as error:
        refusal = error
    assert refusal.shard is not None
    assert len(str(refusal)) < LONGEST
    return None


def header(data: bytes) -> None:
    """Read a shard's header, RecIS's or a plain one, beside safetensors' own reader."""
    choices = Choices(data)
    is_recis = choices.below(2) == 1
    draft = draft_of("recis" if is_recis else "plain", choices.below(256))
    file = choices.of([*draft.headers, ""])
    content = shard_of(draft.trees.get(file, Members()), draft.data.get(file, b""), choices)
    check_header(content, is_recis=is_recis)


def check_header(content: bytes, *, is_recis: bool) -> None:
    """Compare what is said of one file."""
    if len(content) > 16 << 10:
        return  # which would be parsed on a thread
    found = ours(lambda: at_once(_header(content, is_recis=is_recis)))
    wanted = judged(lambda: strict_header(content, recis=is_recis))
    assert _blocks(found) == wanted, (found, wanted)
    if not is_recis and wanted is not None and all(one.dtype in BITS for one in wanted.values()):
        assert _of_safetensors(content) == {
            key: (block.dtype, list(block.shape), content[block.begin : block.end])
            for key, block in wanted.items()
        }


async def _header(content: bytes, *, is_recis: bool) -> ShardHeader:
    source = INDEX if is_recis else FILE
    return await read_header(
        Bytes(content),
        FILE,
        executor=None,  # type: ignore[arg-type]  # nothing is handed to it
        catalog=Catalog(Places({}, {}), {}, source, recis=is_recis),
        turns=asyncio.Lock(),
        problems=Problems(WHERE),
    )


def _blocks(header: ShardHeader | None) -> dict[str, StrictBlock] | None:
    if header is None:
        return None
    return {
        key: StrictBlock(
            block.dtype.name,
            header_shape(block.dtype, block.shape),
            block.offset,
            block.offset + block.nbytes,
        )
        for key, block in header.blocks.items()
    }


def _of_safetensors(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    try:
        found: list[tuple[str, dict[str, Any]]] = deserialize(content)  # type: ignore[no-untyped-call]
    except SafetensorError:
        return None
    return {key: (one["dtype"], list(one["shape"]), bytes(one["data"])) for key, one in found}


def names(data: bytes) -> None:
    """Read `index`, `tensorkey.json` and the sidecar."""
    choices = Choices(data)
    check_names(spoiled(draft_of("recis", choices.below(256)), choices))


def check_names(files: dict[str, bytes]) -> None:
    """Compare what is said of files of names."""
    if not {INDEX, TENSORKEY} <= files.keys():
        return
    found = ours(lambda: _catalog(files))
    wanted = judged(lambda: StrictFolder(files))
    assert (found is None) == (wanted is None), (found, wanted)
    if found is None or wanted is None:
        return
    tensors, tables = strict_index(files[INDEX], files[TENSORKEY])
    assert {name: (place.key, place.shard) for name, place in found.tensors.items()} == tensors
    assert {
        table: {
            slot: {
                ((part.slice.begin, part.slice.end, part.slice.size), *_pair(part.place))
                for part in parts
            }
            for slot, parts in slots.items()
        }
        for table, slots in found.tables.items()
    } == {
        table: {slot: {tuple(part) for part in parts} for slot, parts in slots.items()}
        for table, slots in tables.items()
    }
    assert (found.sidecar is None) == (wanted.digests is None)


def _pair(place: Any) -> tuple[str, str]:  # noqa: ANN401
    return place.key, place.shard


def _catalog(files: dict[str, bytes]) -> Catalog:
    texts = {
        name: at_once(_text(files[name], name))
        for name in (INDEX, TENSORKEY, SIDECAR)
        if name in files
    }
    sidecar = texts.pop(SIDECAR, None)
    return parse_recis(Problems(WHERE), texts, sidecar)


async def _text(content: bytes, name: str) -> bytearray:
    try:
        return await read_small(Bytes(content), name, limit=1 << 30)
    except OSError as error:  # as `read_file` has it
        raise CheckpointError(WHERE, str(error), name) from error


def weight_map(data: bytes) -> None:
    """Read `model.safetensors.index.json`."""
    choices = Choices(data)
    files = spoiled(draft_of("plain", choices.below(256)), choices)
    if SHARDED not in files:
        return
    text = files[SHARDED]
    found = ours(lambda: parse_weight_map(Problems(WHERE), at_once(_text(text, SHARDED)), SHARDED))
    wanted = judged(lambda: strict_weight_map(text))
    assert (found is None) == (wanted is None), (text, found, wanted)
    if found is not None and wanted is not None:
        assert {name: place.shard for name, place in found.tensors.items()} == wanted
        assert all(place.key == name for name, place in found.tensors.items())


TARGETS: dict[str, Callable[[bytes], None]] = {
    "header": header,
    "names": names,
    "weight-map": weight_map,
}
