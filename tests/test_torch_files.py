"""Files of `torch.save`: we read what torch reads of them, and nothing that they name is called."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import struct
import threading
import zipfile
import zlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from asyncloader import (
    CheckpointError,
    CheckpointReader,
    Loader,
    PlanError,
    Runtime,
    convert,
    diff,
    inspect,
    load_tensors,
    verify,
)
from tests.genuine import NAMES, RUN, truth
from tests.storages import Through
from tests.support import flat_tensors, raw

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from torch import Tensor

    from asyncloader._storage.protocol import ReadInto

DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
    torch.bfloat16, torch.float32, torch.float64, torch.uint16, torch.uint32, torch.uint64,
    torch.float8_e4m3fn, torch.complex64,
)  # fmt: skip


def check_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert list(found) == list(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor.detach()), name


def rewritten(path: Path, how: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> None:
    """Write an archive anew, each of its files by `how`."""
    with zipfile.ZipFile(path) as archive:
        files = [(one, archive.read(one)) for one in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for one, content in files:
            how(archive, one, content)


def deflated(archive: zipfile.ZipFile, one: zipfile.ZipInfo, content: bytes) -> None:
    archive.writestr(one.filename, content, zipfile.ZIP_DEFLATED)


def replacing(name: str, content: bytes) -> Callable[..., None]:
    def how(archive: zipfile.ZipFile, one: zipfile.ZipInfo, old: bytes) -> None:
        archive.writestr(one.filename, content if one.filename.endswith(name) else old)

    return how


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Return a tensor, or a view of one, of any dtype."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 5), max_size=4))
    seed = draw(st.integers(0, 99))
    size = max(torch.Size(shape).numel(), 1) * dtype.itemsize
    content = torch.randint(0, 2 if dtype == torch.bool else 256, (size,), dtype=torch.uint8)
    tensor = content.roll(seed).view(dtype)[: torch.Size(shape).numel()].reshape(shape)
    how = draw(st.sampled_from(["as it is", "permuted", "sliced", "expanded", "parameter"]))
    if how == "permuted" and shape:
        return tensor.permute(*draw(st.permutations(range(len(shape)))))
    if how == "sliced" and shape:
        step = draw(st.integers(1, 3))
        return tensor[..., draw(st.integers(0, 2)) :: step]
    if how == "expanded":
        return tensor.expand(draw(st.integers(1, 3)), *shape)
    if how == "parameter":
        return nn.Parameter(tensor, requires_grad=False)
    return tensor


names = st.text(st.characters(codec="utf-8", exclude_characters="."), max_size=6)
values = st.recursive(
    tensors() | st.integers() | st.floats() | st.text(max_size=5) | st.none() | st.booleans(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150)
@given(
    state=st.dictionaries(names, values, max_size=6),
    ordered=st.booleans(),
    protocol=st.integers(2, 5),
    compressed=st.booleans(),
)
def test_what_torch_saves_is_read_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory,
    state: dict[str, Any],
    ordered: bool,
    protocol: int,
    compressed: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / "state.pt"
    torch.save(OrderedDict(state) if ordered else state, path, pickle_protocol=protocol)
    if compressed:
        rewritten(path, deflated)
    wanted = dict(flat_tensors(state))
    found = load_tensors(path)
    check_same(found, wanted)
    destinations = {name: torch.zeros_like(one).contiguous() for name, one in found.items()}
    Loader(path, tensors=destinations, strict=True, chunk_bytes=1 << 12).load()
    check_same(destinations, wanted)
    assert verify(path).ok
    if protocol == 2:
        check_same(found, dict(flat_tensors(torch.load(path, weights_only=True))))


def test_a_model_with_its_metadata_and_tied_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    torch.save(model.state_dict(), tmp_path / "m.pt")
    check_same(load_tensors(tmp_path / "m.pt"), dict(model.state_dict()))


@pytest.mark.parametrize("dims", [(1, 0), (2, 0, 1)])
def test_a_large_tensor_in_pieces_takes_little_memory(tmp_path: Path, dims: list[int]) -> None:
    """Columns of a matrix, of which a read wants a part each; and rows of blocks."""
    shape = (700, 900) if len(dims) == 2 else (40, 100, 150)
    tensor = torch.randn(shape).permute(*dims)
    torch.save({"w": tensor, "half": tensor[..., ::2]}, tmp_path / "x.pt")
    check_same(
        load_tensors(tmp_path / "x.pt", chunk_bytes=100_000),
        {"w": tensor, "half": tensor[..., ::2]},
    )
    rows = CheckpointReader(tmp_path / "x.pt").read_rows("w", 7, 30)
    assert torch.equal(rows, tensor[7:30])


def test_a_comment_and_large_numbers_in_the_archive_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(5.0)}, path)

    def how(archive: zipfile.ZipFile, one: zipfile.ZipInfo, content: bytes) -> None:
        with archive.open(one.filename, "w", force_zip64=True) as file:
            file.write(content)
        archive.comment = b"x" * 999

    rewritten(path, how)
    assert torch.equal(load_tensors(path)["w"], torch.arange(5.0))


@pytest.mark.parametrize("name", NAMES)
def test_a_genuine_checkpoint_is_read_whole_by_every_door(tmp_path: Path, name: str) -> None:
    held, path = truth(name), RUN / name
    check_same(dict(sorted(load_tensors(path).items())), dict(sorted(held.tensors.items())))
    tables, found = held.destinations()
    Loader(path, tables, found, strict=True).load()
    check_same(found, held.tensors)
    reader = CheckpointReader(path)
    assert set(held.tensors) < set(reader.tensor_names())
    for tensor in held.dense:
        assert torch.equal(reader.read_tensor(tensor), held.dense[tensor])
    assert {one.name for one in inspect(path).tensors} == set(held.tensors)  # type: ignore[union-attr]
    assert verify(path).ok
    convert(path, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "back")
    assert diff(path, tmp_path / "back").equal


def test_a_name_in_both_is_reported_and_the_shards_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "ckpt"
    from asyncloader import Saver  # noqa: PLC0415

    Saver(path=path, tensors={"w": torch.ones(2)}).save()
    torch.save({"w": torch.zeros(2), "v": torch.zeros(1)}, path / "model.pt")
    report = Loader(path, tensors={"w": (w := torch.zeros(2)), "v": torch.ones(1)}).load()
    assert torch.equal(w, torch.ones(2))
    assert any("model.pt: 'w': stands in" in one for one in report.warnings)
    assert any("no digests of it" in one for one in report.warnings)
    with pytest.raises(CheckpointError, match=r"model\.pt: asyncloader\.json has no digests"):
        load_tensors(path, verify="require")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", pickle.dumps({"w": 1})])
def test_a_model_that_cannot_be_read_bars_those_alone_who_want_its_tensors(
    tmp_path: Path, content: bytes
) -> None:
    path = shutil.copytree(RUN / "ckpt_30", tmp_path / "c")
    (path / "model.pt").write_bytes(content)
    held = truth("ckpt_30")
    tables, tensors = held.destinations()
    scalars = {name: tensors[name] for name in held.scalars}
    report = Loader(path, tables, scalars, strict=True).load()
    assert report.tables["user"].rows == 111
    assert any("model.pt" in one and "cannot be loaded" in one for one in report.warnings)
    ids = CheckpointReader(path).read_tensor("user@id")
    assert len(ids) == 111
    before = tensors["tower.0.bias"].clone()
    for read in (
        lambda: Loader(path, tables, tensors).load(),
        lambda: load_tensors(path),
        lambda: CheckpointReader(path).tensor_names(),
        lambda: diff(path, RUN / "ckpt_30"),
    ):
        with pytest.raises(CheckpointError, match=r"model\.pt"):
            read()
    assert torch.equal(tensors["tower.0.bias"], before)
    assert [one for one in verify(path).problems if one.file == "model.pt"]
    summary = inspect(path)
    assert summary.ids == 311  # type: ignore[union-attr]
    assert any("model.pt" in one for one in summary.warnings)  # type: ignore[union-attr]


# What is refused.


class _Calls:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("echo called > called",)


def _state(path: Path, value: object) -> Path:
    torch.save({"w": torch.arange(6.0)}, path)
    rewritten(path, replacing("/data.pkl", value if isinstance(value, bytes) else b""))
    return path


STORAGE = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpu%stQ%s(%st(%st\x89ccollections\nOrderedDict\n)RtR"
)


def _tensor(count: bytes, offset: bytes, shape: bytes, stride: bytes) -> bytes:
    return b"\x80\x02}X\x01\x00\x00\x00w" + STORAGE % (count, offset, shape, stride) + b"s."


def _int(number: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", number)


HOSTILE = {
    "a call": (pickle.dumps({"w": _Calls()}), "asks for 'posix.system'"),
    "a call by name": (b"cos\nsystem\n(X\x04\x00\x00\x00exittR.", "asks for 'os.system'"),
    "a class": (b"(cbuiltins\nobject\no.", "instruction 'o'|asks for"),
    "an instance": (b"(ibuiltins\nlist\n.", "instruction 'i'"),
    "a new object": (b"cbuiltins\nlist\n)\x81.", "asks for"),
    "an extension": (b"\x82\x01.", "instruction"),
    "a value that was not kept": (b"j\xff\xff\xff\x7f.", "2147483647 was never kept"),
    "a huge memo in text": (b"]p" + b"9" * 300 + b"\n.", "keeps a value"),
    "a long text that is not there": (b"X\xff\xff\xff\x7fx.", "ends early"),
    "a very long text that is not there": (b"\x8d" + b"\xff" * 7 + b"\x7f.", "ends early"),
    "a text of negative length": (b"\x8b\xff\xff\xff\xff.", "ends early"),
    "a number of many digits": (b"L" + b"9" * 9999 + b"L\n.", "digits"),
    "no end": (b"\x80\x02}", "ends early"),
    "nothing": (b"", "ends early"),
    "an empty stack": (b"0.", "damaged"),
    "another protocol": (b"\x80\x09.", "protocol 9"),
    "a list within itself": (b"\x80\x02}X\x01\x00\x00\x00a]q\x00h\x00as.", "within itself"),
    "a dict that is many": (
        b"\x80\x02}q\x00"
        + b"".join(
            b"}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cuq%c" % (n, n, n + 1) for n in range(99)
        )
        + b".",
        "many times",
    ),
    "an OrderedDict of a list": (
        b"ccollections\nOrderedDict\n(]X\x01\x00\x00\x00atR.",
        "damaged|not read",
    ),
    "one tensor": (b"\x80\x02" + STORAGE % (b"K\x06", b"K\x00", b"K\x06", b"K\x01") + b".", "name"),
    "a tensor beyond its storage": (_tensor(b"K\x06", b"K\x01", b"K\x06", b"K\x01"), "element 6"),
    "a storage of another size": (_tensor(b"K\x07", b"K\x00", b"K\x06", b"K\x01"), "28 bytes"),
    "a tensor before its storage": (
        _tensor(b"K\x06", _int(-1), b"K\x06", b"K\x01"),
        "without a storage",
    ),
    "strides that go back": (_tensor(b"K\x06", b"K\x05", b"K\x06", _int(-1)), "no shape"),
    "an immense tensor": (_tensor(b"K\x06", b"K\x00", _int(1 << 61), b"K\x01"), "element|beyond"),
}


@pytest.mark.parametrize(("text", "words"), HOSTILE.values(), ids=HOSTILE)
def test_a_pickle_that_makes_no_sense_is_refused_and_nothing_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = _state(tmp_path / "x.pt", text)
    w = torch.full((6,), 7.0)
    with pytest.raises(CheckpointError, match=words) as caught:
        Loader(path, tensors={"w": w}).load()
    assert caught.value.shard == "x.pt"
    assert torch.equal(w, torch.full((6,), 7.0))
    assert not (tmp_path / "called").exists()


def test_a_tensor_that_is_expanded_beyond_all_bounds_takes_no_memory(tmp_path: Path) -> None:
    path = _state(tmp_path / "x.pt", _tensor(b"K\x06", b"K\x00", _int(1 << 61), b"K\x00"))
    with pytest.raises(CheckpointError, match=r"'w'.*expanded, from 24 bytes to"):
        load_tensors(path)


def test_tensors_of_other_kinds_keep_no_plain_one_from_being_read(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    odd = {"sparse": torch.ones(3).to_sparse(), "complex": torch.ones(2, dtype=torch.complex128)}
    torch.save({**odd, "w": torch.ones(2)}, path)
    assert torch.equal(load_tensors(path, ["w"])["w"], torch.ones(2))
    with pytest.raises(CheckpointError, match=r"'sparse'.*sparse tensor, which is not read"):
        load_tensors(path)
    with pytest.raises(CheckpointError, match=r"'complex'.*complex128, which is not read"):
        load_tensors(path, ["complex"])
    with pytest.raises(PlanError, match="sparse tensor"):
        Loader(path, tensors={"sparse": torch.ones(3)}).load()
    assert [one.text for one in verify(path).notes if one.name == "complex"]


def _cut(content: bytearray) -> None:
    del content[len(content) // 2 :]


def _encrypted(content: bytearray) -> None:
    at = content.index(b"PK\x01\x02")
    content[at + 8] |= 1


def _listed(name: bytes, field: int, value: bytes) -> Callable[[bytearray], None]:
    """Change a field of a file's entry in the list."""

    def spoil(content: bytearray) -> None:
        at = content.rindex(name)
        begin = content.rindex(b"PK\x01\x02", 0, at) + field
        content[begin : begin + len(value)] = value

    return spoil


def _header_damaged(content: bytearray) -> None:
    at = content.index(b"/data/0")
    content[content.rindex(b"PK\x03\x04", 0, at)] = 0


def _doubled(content: bytearray) -> None:
    at = content.rindex(b"/data/1")
    content[at : at + 7] = b"/data/0"


DAMAGED = {
    "cut short": (_cut, "cut short"),
    "encrypted": (_encrypted, "encrypted"),
    "an unknown compression": (_listed(b"/data/0", 10, b"\x0c\x00"), "'data/0' is compressed"),
    "two sizes": (_listed(b"/data/0", 20, b"\x99\0\0\0"), "'data/0' has two sizes"),
    "a place beyond the file": (_listed(b"/data/1", 42, b"\xff\xff\xff\x7f"), "beyond"),
    "a place over another": (_listed(b"/data/1", 42, b"\x00\x00\x00\x00"), "lies over"),
    "no header": (_header_damaged, "'data/0': its header"),
    "a name twice": (_doubled, "'data/0' is there twice"),
}


@pytest.mark.parametrize(("spoil", "words"), DAMAGED.values(), ids=DAMAGED)
def test_an_archive_that_lies_is_refused_by_the_name_of_its_entry(
    tmp_path: Path, spoil: Callable[[bytearray], None], words: str
) -> None:
    path = tmp_path / "x.pt"
    torch.save({"a": torch.ones(5), "b": torch.ones(9)}, path)
    content = bytearray(path.read_bytes())
    spoil(content)
    path.write_bytes(content)
    w = torch.zeros(5)
    with pytest.raises(CheckpointError, match=words):
        Loader(path, tensors={"a": w}).load()
    assert not w.any()
    with pytest.raises(CheckpointError, match=words):
        inspect(path)


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(5)}, path)
    rewritten(path, deflated)
    content = bytearray(path.read_bytes())
    _listed(b"/data/0", 24, struct.pack("<I", 1 << 30))(content)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot be 1073741824"):
        load_tensors(path)


def test_a_pickle_that_is_a_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(5)}, path)

    def how(archive: zipfile.ZipFile, one: zipfile.ZipInfo, old: bytes) -> None:
        if one.filename.endswith("data.pkl"):
            old = b"\x80\x02" + b"]0" * (1 << 19) + b"}."
        archive.writestr(one.filename, old, zipfile.ZIP_DEFLATED)

    rewritten(path, how)
    content = bytearray(path.read_bytes())
    _listed(b"/data.pkl", 24, struct.pack("<I", 99))(content)  # less than there is
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"'data\.pkl'.* 99 bytes"):
        load_tensors(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_flipped_bit_is_found_by_its_checksum(tmp_path: Path, compressed: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(1000.0).sqrt()}, path)
    if compressed:
        rewritten(path, deflated)
    with zipfile.ZipFile(path) as archive:
        entry = next(one for one in archive.infolist() if one.filename.endswith("data/0"))
    content = bytearray(path.read_bytes())
    content[entry.header_offset + 1500] ^= 1
    path.write_bytes(content)
    found = verify(path)
    assert not found.ok
    assert any(one.file == "x.pt" and "data/0" in (one.name or one.text) for one in found.problems)


def test_an_archive_without_checksums_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(1000.0)}, path)
    content = bytearray(path.read_bytes())
    at = 0
    while (at := content.find(b"PK\x01\x02", at)) >= 0:  # as `set_crc32_options(False)` has it
        content[at + 16 : at + 20] = bytes(4)
        at += 4
    path.write_bytes(content)
    assert verify(path).ok


def test_numbers_of_another_byte_order_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.zeros(5)}, path)
    rewritten(path, replacing("byteorder", b"big"))
    with pytest.raises(CheckpointError, match="stored as b'big'"):
        load_tensors(path)


def test_an_older_file_says_how_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match=r"pickle.*torch\.load"):
        load_tensors(path)


def test_a_file_without_tensors_is_shown(tmp_path: Path) -> None:
    torch.save({"step": 1}, tmp_path / "x.pt")
    found = inspect(tmp_path / "x.pt")
    assert (found.kind, found.tensors) == ("file of torch.save", ())  # type: ignore[union-attr]
    assert load_tensors(tmp_path / "x.pt") == {}


def test_what_is_not_read_is_neither_converted_nor_called_equal(tmp_path: Path) -> None:
    for name, value in {"a": 1.0, "b": 2.0}.items():
        torch.save({"s": torch.full((3,), value).to_sparse(), "w": torch.ones(1)}, tmp_path / name)
    with pytest.raises(CheckpointError, match="'s' is a sparse tensor, which is not read"):
        convert(tmp_path / "a", tmp_path / "x.safetensors")
    assert not (tmp_path / "x.safetensors").exists()
    with pytest.raises(CheckpointError, match="'s' is a sparse tensor, which is not read"):
        diff(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize("at_end", [b"", b"x" * 1000])
def test_verify_finds_what_stands_behind_compressed_bytes(tmp_path: Path, at_end: bytes) -> None:
    path = tmp_path / "x.pt"
    torch.save({"w": torch.arange(9000.0)}, path)

    def how(archive: zipfile.ZipFile, one: zipfile.ZipInfo, content: bytes) -> None:
        if not one.filename.endswith("data/0"):
            archive.writestr(one.filename, content)
            return
        packed = zlib.compressobj(wbits=-15)
        text = packed.compress(content) + packed.flush() + at_end
        entry = zipfile.ZipInfo(one.filename)
        archive.writestr(entry, text)  # stored; the list calls it compressed afterwards
        entry.compress_type, entry.file_size = zipfile.ZIP_DEFLATED, len(content)
        entry.CRC = zlib.crc32(content)

    rewritten(path, how)
    content = bytearray(path.read_bytes())
    at = content.index(b"/data/0")
    begin = content.rindex(b"PK\x03\x04", 0, at)
    content[begin + 8 : begin + 10] = b"\x08\x00"
    path.write_bytes(content)
    assert torch.equal(load_tensors(path)["w"], torch.arange(9000.0))
    found = [one.text for one in verify(path).problems]
    assert len(found) == bool(at_end)
    assert all("1,000 bytes stand behind" in text for text in found)


def test_a_tensor_that_is_cancelled_while_it_is_gathered_ends_soon(tmp_path: Path) -> None:
    """Millions of single reads on one thread, of which the first ones block the storage."""
    task: asyncio.Task[Any]
    loop: asyncio.AbstractEventLoop
    tensor = torch.zeros(1 << 17, 300)[:, 0]
    torch.save({"w": tensor}, tmp_path / "x.pt")
    reads = 0

    class Counting(Through):
        async def on_thread(self, name: str, job: Callable[[ReadInto], Any], /) -> Any:  # noqa: ANN401
            def counted(read: ReadInto) -> Any:  # noqa: ANN401
                def one(offset: int, views: Sequence[memoryview]) -> int:
                    nonlocal reads
                    reads += 1
                    if reads == 1000:
                        loop.call_soon_threadsafe(task.cancel)
                        cancelled.wait()
                    return read(offset, views)

                return job(one)

            return await self.inner.on_thread(name, counted)

    cancelled = threading.Event()

    async def main() -> None:
        nonlocal task, loop
        loop = asyncio.get_running_loop()
        async with Runtime(wrap_storage=Counting) as runtime:
            loader = Loader(tmp_path / "x.pt", tensors={"w": torch.ones(1 << 17)}, runtime=runtime)
            task = asyncio.create_task(loader.aload())
            task.add_done_callback(lambda _: None)
            loop.call_later(0, watch)
            with pytest.raises(asyncio.CancelledError):
                await task

    def watch() -> None:
        if task.cancelling():
            cancelled.set()
        else:
            loop.call_soon(watch)

    asyncio.run(main())
    assert reads < 5000
