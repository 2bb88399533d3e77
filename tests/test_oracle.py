"""The oracle itself: its writer against safetensors and against its own slow reader."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

import pytest
import torch
from safetensors import SafetensorError, safe_open

from tests.oracle import (
    DTYPES,
    Block,
    ModelTable,
    Outcome,
    Part,
    Slice,
    TableData,
    append,
    declare_header_length,
    dense_block,
    edit_header,
    edit_json,
    encode_id,
    flat_bytes,
    read_checkpoint,
    read_parts,
    rows_of,
    shard_header,
    shard_holding,
    sparse_block,
    split_slices,
    truncate,
    write_checkpoint,
    write_ranks,
    write_shard,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

WHOLE = Slice(0, 65536, 65536)
ODD_NAMES = [
    "",
    "a.b/c d",
    'quo"te\\\t\n',
    "späß 火 \U0001f600",
    "m@n@o",
    "c^ar^et",
    "x/part_0",
    "\x7f",
]


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bytes as a tensor; a bool's bytes are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.empty(shape, dtype=dtype)
    high = 2 if dtype == torch.bool else 256
    count = size.numel() * size.element_size()
    raw = torch.randint(0, high, (count,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).reshape(shape) if count else size


def table(rows: int, slots: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> TableData:
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    return TableData(
        ids=ids, slots={name: filled((rows, *shape), kind) for name, (shape, kind) in slots.items()}
    )


def raw(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """Return what must agree, NaN bit for bit."""
    return tensor.dtype, tuple(tensor.shape), flat_bytes(tensor).numpy().tobytes()


def sample() -> tuple[dict[str, TableData], dict[str, Tensor]]:
    """Every dtype as a slot and as a dense tensor, odd names, empty things."""
    slots = {"embedding": ((3, 2), torch.float32), "step_filter": ((1,), torch.int64)}
    every = {f"s_{name}": ((2,), dtype) for name, dtype in DTYPES.items()}
    tables = {
        "user": table(300, slots | every),
        "empty": table(0, slots | every),
        "no slots": table(5, {}),
        "no width": table(5, {"embedding": ((0,), torch.float16)}),
    }
    tables |= {f"t{name}": table(7, slots) for name in ODD_NAMES}
    tensors = {f"d_{name}": filled((3, 7), dtype) for name, dtype in DTYPES.items()}
    tensors |= {name: filled((), torch.float32, seed) for seed, name in enumerate(ODD_NAMES)}
    tensors |= {"none": torch.empty(0, 4), "transposed": filled((4, 5), torch.float64).T}
    tensors |= {"expanded": torch.ones(()).expand(1, 1), "middle": torch.arange(9)[2:7:2]}
    return tables, tensors


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("pad_header", [True, False])
def test_safetensors_opens_every_shard(tmp_path: Path, ranks: int, *, pad_header: bool) -> None:
    tables, tensors = sample()
    write_checkpoint(tmp_path, tables, tensors, ranks=ranks, writers=3, pad_header=pad_header)
    parts, _ = read_parts(tmp_path)
    found: dict[str, Tensor] = {}
    for shard in tmp_path.glob("*.safetensors"):
        with safe_open(shard, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if pad_header:
            assert int.from_bytes(shard.read_bytes()[:8], "little") % 8 == 0
    for name, tensor in tensors.items():
        key = name if "/part_" in name else f"{name}^ "
        assert raw(found.pop(key)) == raw(tensor)
    for name, written in parts.items():
        for rank, part in enumerate(written):
            for slot, tensor in {"id": part.ids, **part.slots}.items():
                key = f"{name}@{slot}".replace("@", ".", 1) + f"/part_{rank}_{ranks}"
                assert raw(found.pop(key)) == raw(tensor)
    assert not found


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("spelling", ["BOOL", "bool"])
@pytest.mark.parametrize("order", ["given", "shuffled", "sorted"])
def test_reading_gives_what_was_written(
    tmp_path: Path, ranks: int, spelling: Literal["BOOL", "bool"], order: str
) -> None:
    tables, tensors = sample()
    seed = 7 if order == "shuffled" else None
    write_checkpoint(
        tmp_path,
        tables,
        tensors,
        ranks=ranks,
        shuffle_seed=seed,
        sort=order == "sorted",
        bool_spelling=spelling,
    )
    read_tables, read_tensors = read_checkpoint(tmp_path)
    assert list(read_tensors) == list(tensors)
    assert all(raw(read_tensors[name]) == raw(tensors[name]) for name in tensors)
    assert list(read_tables) == list(tables)
    for name, given in tables.items():
        found = read_tables[name]
        assert list(found.slots) == list(given.slots)
        assert all(found.slots[slot].dtype == given.slots[slot].dtype for slot in given.slots)
        assert rows_of(found.ids, found.slots) == rows_of(given.ids, given.slots)
    same_order = torch.equal(read_tables["user"].ids, tables["user"].ids)
    assert same_order == (ranks == 1 and order == "given")
    assert shard_header(shard_holding(tmp_path, "d_BOOL^ "))["d_BOOL^ "]["dtype"] == spelling


@pytest.mark.parametrize(("size", "ranks"), [(65536, 4), (10, 3), (7, 5), (3, 5), (65536, 7)])
@pytest.mark.parametrize("sort", [False, True])
def test_ranks_hold_the_ids_of_their_slices(
    tmp_path: Path, size: int, ranks: int, *, sort: bool
) -> None:
    data = table(500, {"embedding": ((1,), torch.float32)})
    write_checkpoint(tmp_path, {"t": data}, {}, ranks=ranks, slice_size=size, sort=sort)
    names = json.loads((tmp_path / "tensorkey.json").read_bytes())
    begin = 0
    for rank, part in enumerate(split_slices(size, ranks)):
        share = size // ranks + (1 if rank < size % ranks else 0)
        assert part == (begin, begin + share, size)
        width = len(str(size))
        name = f"t@id^{str(begin).zfill(width)}@{str(begin + share).zfill(width)}@{size}"
        key = f"t.id/part_{rank}_{ranks}"
        assert names[key] == name
        expected = [
            number for number in data.ids.tolist() if begin <= number % 2**64 % size < begin + share
        ]
        if sort:
            expected.sort(key=lambda number: (number % 2**64 % size, number % 2**64))
        shard = shard_holding(tmp_path, key)
        with safe_open(shard, framework="pt") as file:
            assert file.get_tensor(key).tolist() == expected
        begin += share
    assert begin == size


def test_a_writer_without_a_block_writes_no_file(tmp_path: Path) -> None:
    data = table(40, {"embedding": ((2,), torch.float32)})
    write_checkpoint(tmp_path, {"t": data}, {"w": torch.ones(2)}, ranks=2, writers=4)
    present = {f"model-{number:06d}-of-000008.safetensors": number for number in (0, 1, 2, 4, 5)}
    assert {shard.name for shard in tmp_path.glob("model-*")} == set(present)
    assert json.loads((tmp_path / "index").read_bytes()) == {
        "file_index": present,
        "block_index": {
            "t.id/part_0_2": 0,
            "t.embedding/part_0_2": 1,
            "w^ ": 2,
            "t.id/part_1_2": 4,
            "t.embedding/part_1_2": 5,
        },
    }


def test_a_checkpoint_of_nothing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {})
    assert (tmp_path / "tensorkey.json").read_bytes() == b"{}"
    assert (tmp_path / "index").read_bytes() == b'{"block_index":{},"file_index":{}}'
    assert read_checkpoint(tmp_path) == ({}, {})


def test_names_and_blocks_as_in_the_format(tmp_path: Path) -> None:
    """The slip of `/part_`, the one `@` that turns, blocks back to back without alignment."""
    tensors = {"x/part_0": torch.ones(2), "b": torch.ones(21, dtype=torch.bool), "y": torch.ones(1)}
    write_checkpoint(tmp_path, {"m@n": table(3, {})}, tensors, writers=1)
    index = json.loads((tmp_path / "index").read_bytes())["block_index"]
    assert set(index) == {"m.n@id/part_0_1", "x/part_0^ ", "b^ ", "y^ "}
    header = shard_header(shard_holding(tmp_path, "b^ "))
    assert [(key, entry["data_offsets"]) for key, entry in header.items()] == [
        ("m.n@id/part_0_1", [0, 24]),
        ("x/part_0", [24, 32]),
        ("b^ ", [32, 53]),
        ("y^ ", [53, 57]),
    ]


def test_keys_that_meet_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two blocks"):
        write_checkpoint(tmp_path, {"t": table(1, {})}, {"t.id/part_0_1": torch.ones(1)}, writers=1)
    with pytest.raises(ValueError, match="two blocks"):
        write_ranks(tmp_path, [[dense_block("w", torch.ones(1))]] * 2)


def test_table_data_must_agree() -> None:
    with pytest.raises(ValueError, match="2 rows"):
        TableData(ids=torch.arange(2), slots={"embedding": torch.ones(3, 1)})
    with pytest.raises(ValueError, match="int64"):
        TableData(ids=torch.ones(2))


def test_big_rows_are_gathered_in_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.oracle.shard.CHUNK", 100)
    tables, tensors = sample()
    write_checkpoint(tmp_path / "small", tables, tensors, ranks=2, shuffle_seed=1)
    monkeypatch.undo()
    write_checkpoint(tmp_path / "large", tables, tensors, ranks=2, shuffle_seed=1)
    files = sorted((tmp_path / "large").iterdir())
    assert len(files) == 7
    assert all(file.read_bytes() == (tmp_path / "small" / file.name).read_bytes() for file in files)


def test_a_shard_can_be_wrong_in_every_way(tmp_path: Path) -> None:
    blocks = [
        Block(key="a", dtype="F32", shape=(2,), data=b"\x00" * 8),
        Block(key="b", dtype="odd", shape=(9,), data=memoryview(b"xyz")),
    ]
    shard = tmp_path / "shard"
    write_shard(shard, blocks, data_offsets={"b": (1, 2)}, trailing=b"tail")
    assert shard_header(shard)["b"] == {"dtype": "odd", "shape": [9], "data_offsets": [1, 2]}
    assert shard.read_bytes().endswith(b"\x00xyztail")
    write_shard(shard, blocks, header=b"{}", header_length=2**62)
    assert shard.read_bytes() == (2**62).to_bytes(8, "little") + b"{}" + b"\x00" * 8 + b"xyz"


def test_edits_of_a_written_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.arange(4)})
    shard = shard_holding(tmp_path, "w^ ")
    edit_header(shard, lambda header: header["w^ "].update(shape=[2, 2]))
    assert read_checkpoint(tmp_path)[1]["w"].tolist() == [[0, 1], [2, 3]]
    edit_header(shard, lambda header: header.setdefault("__metadata__", {"k": "v"}))
    append(shard, b"123")
    truncate(shard, by=3)
    assert read_checkpoint(tmp_path)[1]["w"].tolist() == [[0, 1], [2, 3]]
    edit_json(tmp_path / "index", lambda index: index["block_index"].clear())
    assert read_checkpoint(tmp_path)[1] == {}
    declare_header_length(shard, 2**40)
    with pytest.raises(SafetensorError), safe_open(shard, framework="pt"):
        pass


def test_parts_can_claim_what_they_do_not_hold(tmp_path: Path) -> None:
    blocks = [
        sparse_block("t", "id", torch.tensor([1, 70000, 5]), claim=Slice(1, 2, 8)),
        sparse_block("t", "embedding", torch.ones(2, 4)),
    ]
    write_ranks(tmp_path, [blocks])
    assert json.loads((tmp_path / "tensorkey.json").read_bytes()) == {
        "t.id/part_0_1": "t@id^1@2@8",
        "t.embedding/part_0_1": "t@embedding^00000@65536@65536",
    }


def test_ids_are_encoded_as_signed_numbers() -> None:
    assert encode_id(5, 0) == 5
    assert encode_id(5, 3) == 5 + 3 * 2**52
    assert encode_id(2**52 + 5, 1) == 2**52 + 5
    assert encode_id(-1, 0) == 2**52 - 1
    assert encode_id(7, 4093) == 7 + 4093 * 2**52 - 2**64


def part(ids: list[int], values: list[float], claim: Slice = WHOLE) -> Part:
    return Part(
        claim=claim,
        ids=torch.tensor(ids, dtype=torch.int64),
        slots={
            "embedding": torch.tensor(values, dtype=torch.float32).reshape(-1, 1),
            "other": torch.ones(len(ids)),
        },
    )


def values_of(model: ModelTable, slot: str) -> dict[int, float]:
    return {
        key: torch.frombuffer(bytearray(row[slot]), dtype=torch.float32).item()
        for key, row in model.rows.items()
    }


def test_the_model_keeps_what_is_not_listed() -> None:
    spec: dict[str, tuple[tuple[int, ...], torch.dtype, float]] = {
        "embedding": ((1,), torch.float32, 0.5),
        "other": ((), torch.float32, 9.0),
    }
    model = ModelTable(slots=spec, slice=(0, 4, 8), children=("t",))
    model.put(torch.tensor([1]), {"other": torch.tensor([2.0])})
    parts = [part([1, 3, 5, 9], [1, 3, 5, 9]), part([3, 2], [30, 20], Slice(3, 8, 8))]
    outcome = model.apply("t", parts, ["id", "embedding"])
    assert outcome == Outcome(loaded=4, new=2, duplicates=1, dropped=1, foreign=1)
    assert values_of(model, "embedding") == {1: 1, 3: 30, 9: 9}
    assert values_of(model, "other") == {1: 2, 3: 9, 9: 9}
    model.apply(0, [part([1, 11], [7, 8])], ["other"])
    assert values_of(model, "embedding") == {1: 1, 3: 30, 9: 9, 11: 0.5}
    with pytest.raises(KeyError, match="nothing"):
        model.apply("t", [], ["id", "nothing"])
    with pytest.raises(ValueError, match="other"):
        model.put(torch.tensor([1]), {"other": torch.ones(1, 1)})


def test_the_model_encodes_ids_of_coalesced_tables() -> None:
    model = ModelTable(
        slots={"embedding": ((1,), torch.float32, 0.0)}, children=("a", "b"), coalesced=True
    )
    model.apply("a", [part([1, -1], [1, 2])], ["id", "embedding"])
    outcome = model.apply("b", [part([1, 2**52 + 1], [3, 4])], ["id", "embedding"])
    assert outcome == Outcome(loaded=2, new=1, duplicates=1, dropped=0, foreign=0)
    assert values_of(model, "embedding") == {1: 1, 2**52 - 1: 2, 2**52 + 1: 4}


def test_rows_of_repeated_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 ids repeat"):
        rows_of(torch.tensor([1, 1]), {})
