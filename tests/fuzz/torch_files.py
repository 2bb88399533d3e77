"""Files of `torch.save`, spoiled: what `torch.load(weights_only=True)` reads of them, we read."""

from __future__ import annotations

import io
import warnings
import zipfile
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import nn

from asyncloader import CheckpointError
from asyncloader._checkpoint.archive import ArchiveError, list_entries
from asyncloader._checkpoint.problems import Problems
from asyncloader._checkpoint.torch_file import parse_archive, read_contents
from tests.support import flat_tensors, raw

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from asyncloader._checkpoint.header import ShardHeader

    from .choices import Choices as Chosen

from .choices import Choices

__all__ = ["TARGETS", "archive", "pickle"]

WHERE = "here"
# Instructions, and pieces of the texts that stand behind them.
PIECES = (
    b"(", b".", b"0", b"1", b"2", b"N", b"R", b"Q", b"]", b"}", b"a", b"b", b"e", b"s", b"u", b"t",
    b")", b"\x85", b"\x86", b"\x87", b"\x88", b"\x89", b"\x93", b"\x94", b"h\x00", b"h\x05",
    b"q\x00", b"K\x01", b"K\x06", b"J\xff\xff\xff\xff", b"\x8a\x01\x7f", b"X\x01\x00\x00\x000",
    b"X\x01\x00\x00\x001", b"ctorch\nLongStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_parameter\n", b"ccollections\nOrderedDict\n", b"cos\nsystem\n",
)  # fmt: skip


@cache
def drafts() -> tuple[bytes, ...]:
    """Return some archives that torch wrote."""
    base = torch.arange(12.0).view(3, 4)
    states = (
        {"w": torch.ones(2), "n": {"b": torch.tensor([True, False]), "s": torch.tensor(3)}},
        {"t": base.T, "cut": base[1:], "step": base[:, ::2], "wide": base[:1].expand(2, 4)},
        nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict(),
        {"p": nn.Parameter(torch.zeros(2)), "u": torch.ones(3, dtype=torch.uint16), "l": [1, 2.5]},
    )  # fmt: skip
    found = []
    for number, state in enumerate(states):
        for protocol in (2, 4):
            content = io.BytesIO()
            torch.save(state, content, pickle_protocol=protocol)
            if number % 2:
                packed = io.BytesIO()
                with zipfile.ZipFile(content) as one, zipfile.ZipFile(packed, "w", 8) as other:
                    for name in one.namelist():
                        other.writestr(name, one.read(name))
                content = packed
            found.append(content.getvalue())
    return tuple(found)


def edited(content: bytes, choices: Chosen) -> bytes:
    """Change bytes, leave some out, write some twice, put pieces in."""
    changed = bytearray(content)
    for _ in range(choices.below(6)):
        at = choices.below(max(len(changed), 1))
        match choices.below(5):
            case 0:
                changed[at : at + 1] = bytes([choices.below(256)])
            case 1:
                del changed[at : at + choices.below(9)]
            case 2:
                changed[at:at] = changed[at : at + choices.below(40)]
            case 3:
                changed[at:at] = choices.of(PIECES)
            case _:
                changed[at : at + 4] = choices.below(1 << 16).to_bytes(4, "little")
    return bytes(changed)


def pickle(data: bytes) -> None:
    """Spoil what is pickled, within a sound archive."""
    choices = Choices(data)
    content = io.BytesIO(choices.of(drafts()))
    spoiled = io.BytesIO()
    with zipfile.ZipFile(content) as one, zipfile.ZipFile(spoiled, "w") as other:
        for name in one.namelist():
            held = one.read(name)
            other.writestr(name, edited(held, choices) if name.endswith("data.pkl") else held)
    check(spoiled.getvalue())


def archive(data: bytes) -> None:
    """Spoil the archive."""
    choices = Choices(data)
    check(edited(choices.of(drafts()), choices))


def check(content: bytes) -> None:
    """Read a file, and compare it with what torch reads, if both do."""
    found = ours(content)
    if found is None:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wanted = torch.load(rewritten(content), weights_only=True)
            known = dict(flat_tensors(wanted))
        except Exception:  # noqa: BLE001  # anything: it is torch's matter
            return
    for name in found.keys() & known.keys():
        dtype, shape, bytes_ = found[name]
        tensor = known[name].detach()
        if bytes_ is not None and not tensor.is_sparse and not tensor.is_quantized:
            assert (dtype, shape) == (str(tensor.dtype), tuple(tensor.shape)), name
            assert bytes_ == raw(tensor)[2], name


def rewritten(content: bytes) -> io.BytesIO:
    """Write an archive anew: of a spoiled one torch may show memory that it has not filled."""
    sound = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as one, zipfile.ZipFile(sound, "w") as other:
        for name in one.namelist():
            other.writestr(name, one.read(name))
    return sound


def ours(content: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes | None]] | None:
    """Return dtype, shape and bytes of each tensor; `None` if the file is refused."""
    size = len(content)

    def read(offset: int, views: Sequence[memoryview]) -> int:
        assert 0 <= offset <= size
        done = 0
        for view in views:
            part = content[offset + done :][: view.nbytes]
            view[: len(part)] = part
            done += len(part)
        return done

    try:
        entries = list_entries(size, 0, content)
        header = parse_archive(Problems(WHERE), read_contents("x.pt", size, entries, read))
    except (ArchiveError, CheckpointError):
        return None
    return dict(_values(header, size, read))


def _values(
    header: ShardHeader, size: int, read: object
) -> Iterator[tuple[str, tuple[str, tuple[int, ...], bytes | None]]]:
    packed = {one.offset: one for one in header.packed}
    for name, block in header.blocks.items():
        held: bytes | None = None
        if block.dtype.itemsize is not None and block.nbytes < 1 << 20:
            view = memoryview(bytearray(block.nbytes))
            try:
                if block.offset in packed and block.nbytes:
                    packed[block.offset].fill(read, 0, view)  # type: ignore[arg-type]
                elif block.nbytes:
                    assert block.offset + block.nbytes <= size
                    read(block.offset, [view])  # type: ignore[operator]
                held = bytes(view)
            except OSError:  # compressed bytes that are damaged
                held = None
        yield name, (f"torch.{block.dtype}", block.shape, held)


TARGETS = {"archive": archive, "pickle": pickle}
