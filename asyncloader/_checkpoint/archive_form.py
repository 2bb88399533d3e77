"""The text of `model.pt`: a zip as `torch.save` writes it, all but the bytes of its tensors.

    archive/data.pkl      pickled `OrderedDict`: name → dtype, shape, number of a storage
    archive/byteorder     `little`
    archive/version       `3`
    archive/data/N        the bytes of storage N, stored as they are

Storages are contiguous, each no longer than its tensors, and begin at multiples of 64 bytes. So
where each byte goes is known before any is read; only checksums, which headers hold, come later.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from .dtypes import DType


_ALIGNMENT = 64
_LOCAL, _CENTRAL = struct.Struct("<IHHHHHIIIHH"), struct.Struct("<IHHHHHHIIIHHHHHII")
_END, _END_64 = struct.Struct("<IHHHHIIH"), struct.Struct("<IQHHIIQQQQ")
_LOCATOR = struct.Struct("<IIQI")
_VERSION, _VERSION_64 = 20, 45
_DATE = 0x21  # 1 January 1980, the first that a zip can say
_MANY, _LONG = 0xFFFF, 0xFFFFFFFF  # say: see the field of 64 bits
_SIZES_64 = 1  # the id of an extra field
_PADDING = b"FB"  # the one that torch pads with

# By torch's name. Later dtypes have no class of their own: their storages are bytes.
_STORAGES = {
    "bool": "BoolStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "complex64": "ComplexFloatStorage",
}


class PickledTensor(NamedTuple):
    """A tensor, and the number of the storage that is all its bytes."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    storage: int


class _Entry(NamedTuple):
    name: bytes
    size: int
    offset: int  # of its local header
    begin: int  # of its bytes


@dataclass(frozen=True, slots=True)
class ArchiveForm:
    """Where everything stands in the file.

    Attributes:
        pickled: The content of `data.pkl`.
        head: All bytes before the header of the first storage.
    """

    pickled: bytes
    head: bytes
    _texts: tuple[tuple[_Entry, int], ...]  # entries of the head, and their checksums
    _storages: tuple[_Entry, ...]

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """By storage, where its header begins, and where its bytes do."""
        return [(entry.offset, entry.begin) for entry in self._storages]

    @property
    def size(self) -> int:
        """The length of the file."""
        return self._end + len(self.tail([0] * len(self._storages)))

    @property
    def _end(self) -> int:
        """The first byte behind the last storage."""
        last = self._storages[-1] if self._storages else self._texts[-1][0]
        return last.begin + last.size

    def header(self, storage: int, crc: int) -> bytes:
        """Return the header of a storage, which ends where its bytes begin."""
        return _header(self._storages[storage], crc)

    def tail(self, crcs: Sequence[int]) -> bytes:
        """Return all bytes behind the last storage; `crcs` are the checksums of the storages."""
        sums = [*self._texts, *zip(self._storages, crcs, strict=True)]
        directory = b"".join(_listed(entry, crc) for entry, crc in sums)
        return directory + _closing(len(sums), len(directory), self._end)


def archive_form(tensors: Sequence[PickledTensor], sizes: Iterable[int]) -> ArchiveForm:
    """Lay out a file; `sizes` are the bytes of each storage."""
    pickled = _pickled(tensors)
    texts, at, head = [], 0, bytearray()
    for name, text in (("data.pkl", pickled), ("byteorder", b"little"), ("version", b"3\n")):
        entry, crc = _entry(f"archive/{name}", len(text), at), zlib.crc32(text)
        texts.append((entry, crc))
        head += _header(entry, crc) + text
        at = len(head)
    storages = []
    for number, size in enumerate(sizes):
        storages.append(entry := _entry(f"archive/data/{number}", size, at))
        at = entry.begin + size
    return ArchiveForm(pickled, bytes(head), tuple(texts), tuple(storages))


def _entry(name: str, size: int, offset: int) -> _Entry:
    raw = name.encode()
    least = offset + _LOCAL.size + len(raw) + len(_sizes_64(size)) + 4
    return _Entry(raw, size, offset, -(-least // _ALIGNMENT) * _ALIGNMENT)


def _sizes_64(size: int) -> bytes:
    return b"" if size < _LONG else struct.pack("<HHQQ", _SIZES_64, 16, size, size)


def _header(entry: _Entry, crc: int) -> bytes:
    """Return a local header, and the padding that lets the bytes begin where they shall."""
    long = _sizes_64(entry.size)
    room = entry.begin - entry.offset - _LOCAL.size - len(entry.name) - len(long) - 4
    extra = long + _PADDING + struct.pack("<H", room) + b"Z" * room
    size = min(entry.size, _LONG)
    version = _VERSION_64 if long else _VERSION
    fields = version, 0, 0, 0, _DATE, crc, size, size, len(entry.name), len(extra)
    return _LOCAL.pack(0x04034B50, *fields) + entry.name + extra


def _listed(entry: _Entry, crc: int) -> bytes:
    """Return the entry of the central directory."""
    sizes = (entry.size, entry.size) if entry.size >= _LONG else ()
    long = (*sizes, entry.offset) if entry.offset >= _LONG else sizes
    extra = struct.pack(f"<HH{len(long)}Q", _SIZES_64, 8 * len(long), *long) if long else b""
    size, version = min(entry.size, _LONG), _VERSION_64 if long else _VERSION
    fields = version, version, 0, 0, 0, _DATE, crc, size, size, len(entry.name), len(extra)
    place = 0, 0, 0, 0, min(entry.offset, _LONG)
    return _CENTRAL.pack(0x02014B50, *fields, *place) + entry.name + extra


def _closing(count: int, length: int, offset: int) -> bytes:
    """Return the end of a zip, given its central directory's entries, length and place."""
    few, short, near = min(count, _MANY), min(length, _LONG), min(offset, _LONG)
    end = _END.pack(0x06054B50, 0, 0, few, few, short, near, 0)
    if (few, short, near) == (count, length, offset) and few < _MANY and max(short, near) < _LONG:
        return end
    versions = _VERSION_64, _VERSION_64
    rest = 0, 0, count, count, length, offset
    long = _END_64.pack(0x06064B50, _END_64.size - 12, *versions, *rest)
    return long + _LOCATOR.pack(0x07064B50, 0, offset + length, 1) + end


def _pickled(tensors: Sequence[PickledTensor]) -> bytes:
    """Return the pickle that `torch.save` makes of an `OrderedDict` of such tensors."""
    memo: dict[bytes, int] = {}

    def once(made: bytes) -> bytes:
        """Return what makes an object the first time, and what recalls it later."""
        if made in memo:
            return b"h" + bytes([memo[made]])
        memo[made] = len(memo)
        return made + b"q" + bytes([memo[made]])

    def tensor(one: PickledTensor) -> Iterator[bytes]:
        kind = _STORAGES.get(one.dtype.torch)
        inner = (max(n, 1) for n in one.shape[:0:-1])
        strides = [*accumulate(inner, int.__mul__, initial=1)][: len(one.shape)]
        length = _product(one.shape)
        yield _text(one.name)
        yield once(_known("torch._utils", f"_rebuild_tensor_v{3 if kind is None else 2}")) + b"("
        yield b"(" + once(_text("storage"))
        yield once(_known("torch", kind) if kind else _known("torch.storage", "UntypedStorage"))
        yield _text(str(one.storage)) + once(_text("cpu"))
        yield _number(length if kind else length * (one.dtype.itemsize or 1)) + b"tQ"
        yield _number(0) + _numbers(one.shape) + _numbers(strides[::-1])
        # It needs no gradient, and has no hooks.
        yield b"\x89" + once(_known("collections", "OrderedDict")) + b")R"
        yield b"tR" if kind else once(_known("torch", one.dtype.torch)) + b"tR"

    parts = [b"\x80\x02" + once(_known("collections", "OrderedDict")) + b")R("]
    parts += [part for one in tensors for part in tensor(one)]
    return b"".join(parts) + b"u."


def _product(shape: tuple[int, ...]) -> int:
    length = 1
    for n in shape:
        length *= n
    return length


def _known(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def _number(value: int) -> bytes:
    if value < 1 << 8:
        return b"K" + bytes([value])
    if value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)


def _numbers(values: Sequence[int]) -> bytes:
    return b"(" + b"".join(map(_number, values)) + b"t"


_POLYNOMIAL = 0xEDB88320


def joined_crc(first: int, second: int, length: int) -> int:
    """Return the CRC-32 of bytes, given that of two parts; `length` is that of the second."""
    return _times(_power(8 * length), first) ^ second


def _times(one: int, other: int) -> int:
    """Multiply two polynomials modulo that of CRC-32; bit 31 is x⁰."""
    product = 0
    while one:
        if one & 1 << 31:
            product ^= other
        one = one << 1 & 0xFFFFFFFF
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return product


def _power(exponent: int) -> int:
    """Return x to the power of `exponent`, by squaring."""
    result, square = 1 << 31, 1 << 30
    while exponent:
        if exponent & 1:
            result = _times(result, square)
        square = _times(square, square)
        exponent >>= 1
    return result
