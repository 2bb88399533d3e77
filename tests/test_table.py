"""The hash table, through its public methods and the updates that loaders make."""

from __future__ import annotations

import copy
import inspect
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from asyncloader import HashTable, Slice, UpdateCounts, gen_slice
from tests.oracle import DTYPES, encode_id, flat_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from asyncloader._table.schema import Initializer
    from asyncloader._table.update import TableUpdate

EXTREMES = [-(2**63), 2**63 - 1, -1, 0, 1, 2**52, -(2**52), 65536]
NAN_BITS = 0x7FC0_1234


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def column(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


def content(
    table: HashTable, slot: str = "embedding", child: str | None = None
) -> dict[int, bytes]:
    """Return the raw bytes of each id's row, and check that all ways to ask agree."""
    found, rows = table.ids(child), table.rows(slot, child)
    assert len(found) == len(rows) == len(set(found.tolist()))
    assert table.contains(found, child).all()
    assert bits(table.lookup(found, slot, child)) == bits(rows)
    return {id_: bits(row) for id_, row in zip(found.tolist(), rows, strict=True)}


def bits(tensor: Tensor) -> bytes:
    return flat_bytes(tensor).numpy().tobytes()


def values(table: HashTable, slot: str = "embedding") -> dict[int, float]:
    return dict(zip(table.ids().tolist(), table.rows(slot).reshape(-1).tolist(), strict=True))


def filled(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bytes as a tensor; a bool's bytes are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    raw = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), generator=generator)
    return raw.to(torch.uint8).view(dtype).reshape(shape)


def finish(update: TableUpdate, threads: int = 1) -> None:
    for wave in update.finish(threads=threads):
        for job in wave:
            job()


def put(update: TableUpdate, layer: int, rank: int, new: Tensor, **slots: Tensor) -> None:
    """Reserve rows, write to them, and index their ids."""
    first = update.reserve(layer, len(new), rank)
    update.view("id", first, len(new)).copy_(new)
    for slot, rows in slots.items():
        update.view(slot, first, len(new)).copy_(rows)
    update.make_room(layer, len(new))
    jobs = update.index_jobs(layer, first, len(new), None, threads=2)
    update.indexed(layer, [job() for job in jobs])


# Making one


def test_the_constructor_takes_recis_arguments_in_recis_order() -> None:
    parameters = inspect.signature(HashTable).parameters
    assert list(parameters) == [
        "embedding_shape",
        "block_size",
        "dtype",
        "device",
        "coalesced",
        "children",
        "slice",
        "initializer",
        "name",
    ]
    defaults = [parameter.default for parameter in parameters.values()][1:]
    assert defaults == [1024, torch.float32, "cpu", False, None, None, None, "hashtable"]


def test_a_new_table_holds_nothing_and_accepts_every_id() -> None:
    table = HashTable([3])
    assert (table.name, table.children, table.coalesced) == ("hashtable", ("hashtable",), False)
    assert (table.slice, table.device) == (gen_slice(), torch.device("cpu"))
    assert (len(table), table.ids().dtype, tuple(table.ids().shape)) == (0, torch.int64, (0,))
    assert tuple(table.rows().shape) == (0, 3)
    assert not table.contains(ids(0, 1)).any()
    assert bits(table(ids(0, 1))) == bits(torch.zeros(2, 3))


@pytest.mark.parametrize("block_size", [0, -1, 1.5, True, None])
def test_a_block_size_that_makes_no_sense_is_refused(block_size: int) -> None:
    with pytest.raises(ValueError, match="block_size"):
        HashTable([1], block_size=block_size)


@pytest.mark.parametrize(
    ("problem", "arguments", "error", "match"),
    [
        ("no width", {"embedding_shape": [0]}, ValueError, "positive"),
        ("negative", {"embedding_shape": [2, -1]}, ValueError, "positive"),
        ("fraction", {"embedding_shape": [1.5]}, ValueError, "positive"),
        ("text dtype", {"dtype": "float32"}, TypeError, "dtype"),
        ("tuple slice", {"slice": (0, 1, 2)}, TypeError, "gen_slice"),
        ("text initializer", {"initializer": "x"}, TypeError, "initializer"),
        ("text children", {"children": "ab"}, TypeError, "list of names"),
        ("number child", {"children": [1]}, TypeError, "list of names"),
        ("two children", {"children": ["a", "b"]}, ValueError, "coalesced=True"),
        ("no child", {"coalesced": True, "children": []}, ValueError, "1 to 4094"),
        ("twins", {"coalesced": True, "children": ["a", "a"]}, ValueError, "different"),
    ],
    ids=str,
)
def test_arguments_that_make_no_sense_are_refused(
    problem: str, arguments: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        HashTable(**{"embedding_shape": [1], **arguments})


def test_4094_children_are_the_limit() -> None:
    names = [f"c{number}" for number in range(4095)]
    assert len(HashTable([1], coalesced=True, children=names[:-1]).children) == 4094
    with pytest.raises(ValueError, match="4094"):
        HashTable([1], coalesced=True, children=names)


def test_a_table_counts_as_true_even_if_it_is_empty() -> None:
    """`if table:` asks whether there is a table, as it does for every other module."""
    assert bool(HashTable([1]))


def test_repr_shows_what_the_table_is_and_how_much_it_holds() -> None:
    table = HashTable([4, 2], name="user", slice=Slice(0, 5, 10))
    table.add_slot("step", [], torch.int64)
    table.insert(ids(1, 13), torch.zeros(2, 4, 2))
    assert repr(table) == (
        "HashTable('user', 2 ids, slots=(embedding: [4, 2] float32, step: [] int64), "
        "slice=00@05@10)"
    )
    family = HashTable([1], coalesced=True, children=["a", "b"], name="both")
    assert repr(family).endswith("children=['a', 'b'])")


# Slots


def test_slots_are_described_in_order_embedding_first() -> None:
    table = HashTable([2], dtype=torch.float16)
    table.add_slot("b", [3, 1], torch.int64, 5)
    table.add_slot("a", [])
    assert [(s.name, s.shape, s.dtype, s.initializer) for s in table.slots().values()] == [
        ("embedding", (2,), torch.float16, 0.0),
        ("b", (3, 1), torch.int64, 5),
        ("a", (), torch.float32, 0.0),
    ]
    assert list(table.slots()) == ["embedding", "b", "a"]


@pytest.mark.parametrize(
    ("initializer", "expected"),
    [
        (0.0, 0.0),
        (-0.0, -0.0),
        (2, 2.0),
        (math.nan, math.nan),
        (lambda rows: rows.fill_(3.0), 3.0),
        (torch.nn.init.ones_, 1.0),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_slot_starts_with_its_initial_value_whether_ids_come_before_or_after(
    initializer: Initializer, expected: float, when: str
) -> None:
    table = HashTable([1], block_size=2)
    if when == "before":
        table.insert(ids(7, 8, 9), column(1, 2, 3))
    table.add_slot("s", [2, 1], torch.float32, initializer)
    if when == "after":
        table.insert(ids(7, 8, 9), column(1, 2, 3))
    assert bits(table.rows("s")) == bits(torch.full((3, 2, 1), expected))
    assert bits(table.lookup(ids(5), "s")) == bits(torch.zeros(1, 2, 1))


def test_embeddings_that_nobody_wrote_start_with_the_tables_initializer() -> None:
    table = HashTable([2], initializer=torch.nn.init.ones_)
    table.add_slot("s", [])
    table.insert(ids(1), torch.tensor([5.0]), slot="s")
    assert values(table, "s") == {1: 5.0}
    assert table(ids(1, 2)).tolist() == [[1, 1], [0, 0]]


def test_a_slot_added_later_is_initialised_in_rows_that_an_aborted_update_wrote_to() -> None:
    table = HashTable([1])
    table.insert(ids(1), column(1))
    update = table.begin(most=2, expected=2)
    put(update, update.layer(frozenset({"embedding"}), 2), 0, ids(2, 3), embedding=column(8, 9))
    update.abort()
    table.add_slot("s", [1])
    table.insert(ids(5, 6), column(5, 6), slot="s")
    assert values(table) == {1: 1, 5: 0, 6: 0}
    assert values(table, "s") == {1: 0, 5: 5, 6: 6}


@pytest.mark.parametrize("name", ["id", "embedding", "s"])
def test_a_slot_name_that_is_taken_is_refused(name: str) -> None:
    table = HashTable([1])
    table.add_slot("s", [1])
    with pytest.raises(ValueError, match=f"already has a slot '{name}'"):
        table.add_slot(name, [1])


def test_an_initializer_that_raises_leaves_the_table_as_it_was() -> None:
    def fail(_: Tensor) -> None:
        raise ArithmeticError("no values")

    table = HashTable([1])
    table.insert(ids(1), column(1))
    with pytest.raises(ArithmeticError, match="no values"):
        table.add_slot("s", [1], initializer=fail)
    assert list(table.slots()) == ["embedding"]
    table.clear()
    table.add_slot("s", [1], initializer=fail)
    with pytest.raises(ArithmeticError, match="no values"):
        table.insert(ids(1), column(1))
    assert len(table) == 0
    table.insert(ids(), torch.zeros(0, 1))  # the table can be changed again


# Ids and rows


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1, 2, 3)])
def test_every_dtype_and_shape_of_row_comes_back_bit_for_bit(
    name: str, shape: tuple[int, ...]
) -> None:
    dtype = DTYPES[name]
    table = HashTable(shape, block_size=3, dtype=dtype)
    table.add_slot("s", shape, dtype, 1)
    first, second = filled((4, *shape), dtype, 1), filled((4, *shape), dtype, 2)
    table.insert(ids(0, 1, 2, 3), first)
    table.insert(ids(3, 4, 5, 6), second)  # in another piece of memory
    wanted = {n: bits(first[n]) for n in range(3)} | {3 + n: bits(second[n]) for n in range(4)}
    assert content(table) == wanted
    one = bits(torch.ones(shape).to(dtype))
    assert content(table, "s") == dict.fromkeys(range(7), one)
    nothing = bytes(len(one))
    assert bits(table.lookup(ids(2, 9, 4))) == wanted[2] + nothing + wanted[4]
    assert table.delete(ids(0, 1, 2)) == 3
    assert content(table) == {n: wanted[n] for n in range(3, 7)}


def test_every_int64_is_a_legal_id() -> None:
    table = HashTable([1], block_size=1)
    table.insert(ids(*EXTREMES), column(*range(len(EXTREMES))))
    assert values(table) == dict(zip(EXTREMES, range(len(EXTREMES)), strict=True))
    assert not table.contains(ids(*(id_ ^ 2 for id_ in EXTREMES))).any()
    assert table.delete(ids(-(2**63), 2**63 - 1)) == 2
    assert set(table.ids().tolist()) == set(EXTREMES[2:])


@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 2), (1, 4, 1), (2, 0, 3)])
def test_ids_of_any_shape_are_looked_up(shape: tuple[int, ...]) -> None:
    table = HashTable([2, 3])
    rows = filled((4, 2, 3), torch.float32)
    table.insert(ids(0, 1, 2, 3), rows)
    wanted = torch.arange(math.prod(shape)).reshape(shape)
    for found in (table(wanted), table.forward(wanted), table.lookup(wanted)):
        assert found.shape == (*shape, 2, 3)
        assert bits(found) == bits(rows[: wanted.numel()])
    assert table.contains(wanted).shape == shape
    assert table.contains(wanted).all()


def test_ids_may_be_strided_and_of_any_integer_type() -> None:
    table = HashTable([1])
    table.insert(torch.arange(10, dtype=torch.int32)[::2], column(0, 2, 4, 6, 8)[:, :])
    grid = torch.arange(9, dtype=torch.int16).reshape(3, 3).T
    assert table(grid)[..., 0].tolist() == [[0, 0, 6], [0, 4, 0], [2, 0, 8]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_ids_that_are_no_integers_are_refused(dtype: torch.dtype) -> None:
    table = HashTable([1])
    odd = torch.ones(1, dtype=dtype)
    for use in (table, table.contains, table.delete, lambda odd: table.insert(odd, column(1))):
        with pytest.raises(TypeError, match="int64"):
            use(odd)


def test_what_is_handed_out_is_a_copy() -> None:
    table = HashTable([1])
    table.insert(ids(1, 2), column(1, 2))
    for mine in (table.rows(), table(ids(1, 2)), table.ids()):
        mine.fill_(77)
    assert values(table) == {1: 1, 2: 2}


def test_what_is_handed_in_is_copied() -> None:
    table = HashTable([1])
    new, rows = ids(1, 2), column(1, 2)
    table.insert(new, rows)
    new.fill_(9)
    rows.fill_(9)
    assert values(table) == {1: 1, 2: 2}


def test_rows_that_need_gradients_and_are_not_contiguous_can_be_inserted() -> None:
    table = HashTable([2, 2])
    rows = torch.arange(8.0).reshape(2, 2, 2).transpose(1, 2).requires_grad_()
    table.insert(ids(1, 2), rows)
    assert torch.equal(table(ids(1, 2)), rows)
    assert not table(ids(1)).requires_grad


# Changing it


def test_insert_replaces_adds_and_lets_the_later_of_two_rows_win() -> None:
    table = HashTable([1], block_size=1)
    table.add_slot("s", [1], initializer=-1.0)
    table.insert(ids(1, 2), column(1, 2))
    table.insert(ids(1, 2), column(10, 20), slot="s")
    table.insert(ids(2, 3, 3, 4, 2), column(5, 6, 7, 8, 9))
    assert values(table) == {1: 1, 2: 9, 3: 7, 4: 8}
    assert values(table, "s") == {1: 10, 2: 20, 3: -1, 4: -1}


def test_nan_payloads_and_signs_of_zero_survive() -> None:
    table = HashTable([2])
    odd = torch.tensor([NAN_BITS, -(2**31)], dtype=torch.int32).view(torch.float32)[None]
    table.insert(ids(1), odd)
    table.add_slot("s", [])
    table.insert(ids(1, 2), torch.ones(2), slot="s")  # copies the embedding to a new row
    assert bits(table(ids(1))) == bits(odd)


@pytest.mark.parametrize(
    ("new", "rows", "error", "match"),
    [
        (ids(1), torch.zeros(1, 2, dtype=torch.float64), TypeError, "float64"),
        (ids(1), torch.zeros(1, 3), ValueError, r"\[1, 2\], got \[1, 3\]"),
        (ids(1, 2), torch.zeros(1, 2), ValueError, r"2 ids need"),
        (ids(1), torch.zeros(2), ValueError, r"got \[2\]"),
        (ids(12), torch.zeros(1, 2), ValueError, "id 12 is not in slice 00@02@10"),
        (ids(1, -1), torch.zeros(2, 2), ValueError, "id -1 is not in slice"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    new: Tensor, rows: Tensor, error: type[Exception], match: str
) -> None:
    table = HashTable([2], slice=Slice(0, 2, 10))
    with pytest.raises(error, match=match):
        table.insert(new, rows)
    assert len(table) == 0
    table.insert(ids(11, 2**63 - 8), torch.ones(2, 2))  # 2**63 - 8 ends in 0


def test_slots_and_children_that_are_not_there_are_named() -> None:
    table = HashTable([1], name="t", coalesced=True, children=["a", "b"])
    table.insert(ids(1), column(1), child="a")
    uses: list[Callable[[str], object]] = [
        table.rows,
        lambda name: table.lookup(ids(1), name),
        lambda name: table.insert(ids(1), column(1), slot=name),
    ]
    for use in uses:
        with pytest.raises(KeyError, match="'t' has no slot 'id', only embedding"):
            use("id")
    uses = [
        table.ids,
        lambda name: table.rows(child=name),
        lambda name: table.lookup(ids(1), child=name),
        lambda name: table.contains(ids(1), name),
        lambda name: table.insert(ids(1), column(1), child=name),
        lambda name: table.delete(ids(1), name),
    ]
    for use in uses:
        with pytest.raises(KeyError, match="'t' has no child 'c', only a, b"):
            use("c")


def test_delete_takes_out_what_is_there_and_says_how_many_that_were() -> None:
    table = HashTable([1], block_size=1)
    table.insert(torch.arange(10), torch.arange(10.0)[:, None])
    assert table.delete(ids(3, 3, 99, 5)) == 2
    assert table.delete(ids(3, 99)) == 0
    assert table.delete(ids()) == 0
    assert values(table) == {n: n for n in (0, 1, 2, 4, 6, 7, 8, 9)}
    table.insert(ids(3), column(33))
    assert values(table)[3] == 33
    assert table.delete(torch.arange(10)) == 9
    assert (len(table), table.ids().tolist()) == (0, [])


def test_clear_takes_everything_out_and_keeps_the_slots() -> None:
    table = HashTable([1], block_size=1)
    table.add_slot("s", [2], initializer=1.5)
    table.insert(ids(1, 2), column(1, 2))
    table.clear()
    assert (len(table), list(table.slots())) == (0, ["embedding", "s"])
    assert not table.contains(ids(1, 2)).any()
    table.insert(ids(2), column(5))
    assert values(table) == {2: 5}
    assert table.rows("s").tolist() == [[1.5, 1.5]]


@pytest.mark.parametrize("held", [0, 3])
def test_reserve_changes_nothing_that_can_be_seen(held: int) -> None:
    table = HashTable([1], block_size=2)
    table.insert(torch.arange(held), torch.arange(float(held))[:, None])
    for count in (0, 1, 100, 50, 1000):
        table.reserve(count)
        assert values(table) == {n: n for n in range(held)}
    table.insert(torch.arange(500), torch.arange(500.0)[:, None])
    assert values(table) == {n: n for n in range(500)}


def test_memory_is_taken_for_once_after_reserve() -> None:
    table = HashTable([1], block_size=8)
    table.reserve(1000)
    [before] = table._state.segments.items
    for start in range(0, 1000, 100):
        table.insert(torch.arange(start, start + 100), torch.zeros(100, 1))
    assert [segment.slots for segment in table._state.segments.items] == [before.slots]


def capacity(table: HashTable) -> int:
    """Return for how many rows the table holds memory."""
    segments = sum(segment.capacity for segment in table._state.segments.items)
    return max(segments, len(table._state.ids))


def test_replacing_the_same_ids_over_and_over_takes_bounded_memory() -> None:
    table = HashTable([1], block_size=16)
    for turn in range(60):
        table.insert(torch.arange(100), torch.full((100, 1), float(turn)))
        assert capacity(table) < 8 * 100
        assert len(table._state.segments.items) < 10
    assert values(table) == dict.fromkeys(range(100), 59.0)


def test_replacing_one_of_many_ids_over_and_over_takes_bounded_memory() -> None:
    table = HashTable([1], block_size=16)
    table.insert(torch.arange(100), torch.zeros(100, 1))
    for turn in range(500):
        table.insert(ids(turn % 7), column(turn))
    assert capacity(table) < 8 * 100
    assert values(table)[499 % 7] == 499


def test_deleting_gives_memory_back() -> None:
    table = HashTable([1], block_size=16)
    table.insert(torch.arange(10_000), torch.arange(10_000.0)[:, None])
    table.delete(torch.arange(10_000)[torch.arange(10_000) % 100 != 0])
    assert values(table) == {n: n for n in range(0, 10_000, 100)}
    assert sum(segment.capacity for segment in table._state.segments.items) <= 112
    table.delete(torch.arange(10_000))
    assert capacity(table) == 0


# Children


def test_a_child_is_asked_with_its_own_ids() -> None:
    names = [f"c{number}" for number in range(4094)]
    table = HashTable([1], coalesced=True, children=names)
    chosen = {"c0": 0, "c1": 1, "c2047": 2047, "c2048": 2048, "c4093": 4093}
    for name, number in chosen.items():
        table.insert(ids(5, 2**52 - 1), column(number, number + 0.5), child=name)
    assert set(table.ids().tolist()) == {
        encode_id(id_, number) for number in chosen.values() for id_ in (5, 2**52 - 1)
    }
    for name, number in chosen.items():
        assert table.ids(name).tolist() == [5, 2**52 - 1]
        assert table.rows(child=name)[:, 0].tolist() == [number, number + 0.5]
        assert table.lookup(ids(2**52 - 1, 6, 5), child=name)[:, 0].tolist() == [
            number + 0.5,
            0,
            number,
        ]
        assert table.contains(ids(5, 6), child=name).tolist() == [True, False]
        encoded = ids(encode_id(5, number), encode_id(6, number))
        assert table(encoded)[:, 0].tolist() == [number, 0]
        assert (encoded[0].item() < 0) == (number >= 2048)
    assert table.ids("c7").tolist() == []
    assert table.delete(ids(5, 7), child="c2048") == 1
    assert table.ids("c2048").tolist() == [2**52 - 1]
    assert table.ids("c4093").tolist() == [5, 2**52 - 1]


@pytest.mark.parametrize("id_", [-1, -(2**63), 2**52, 2**52 + 7, 2**63 - 1, -5])
def test_of_a_childs_id_only_52_bits_count(id_: int) -> None:
    table = HashTable([1], coalesced=True, children=["a", "b"])
    table.insert(ids(id_), column(3), child="b")
    assert table.ids("b").tolist() == [id_ % 2**52]
    assert table.ids().tolist() == [encode_id(id_, 1)]
    assert table.lookup(ids(id_, id_ % 2**52), child="b")[:, 0].tolist() == [3, 3]
    assert not table.contains(ids(id_), child="a").item()


def test_a_childs_ids_are_held_against_the_slice_as_they_stand_on_disk() -> None:
    table = HashTable([1], coalesced=True, children=["a", "b"], slice=Slice(3, 6, 10))
    table.insert(ids(3, 15), column(1, 2), child="b")
    table.insert(ids(encode_id(4, 1)), column(3))
    with pytest.raises(ValueError, match="id 2 is not in slice"):
        table.insert(ids(2), column(1), child="b")
    with pytest.raises(ValueError, match="id 7 is not in slice"):
        table.insert(ids(encode_id(7, 1)), column(1))
    assert table.ids("b").tolist() == [3, 15, 4]


def test_a_table_that_is_not_coalesced_is_its_own_child() -> None:
    table = HashTable([1], name="t")
    table.insert(ids(-1), column(1), child="t")
    assert table.ids("t").tolist() == table.ids().tolist() == [-1]
    named = HashTable([1], name="t", children=["other"])
    assert named.children == ("other",)
    named.insert(ids(2**60), column(1), child="other")
    assert named.ids("other").tolist() == [2**60]


# Inside other modules


def test_a_module_around_a_table_works_as_ever() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = HashTable([2], coalesced=True, children=["a", "b"])
            self.top = torch.nn.Linear(2, 1)

    model = Model()
    model.table.insert(ids(1), torch.ones(1, 2), child="b")
    seen: list[str] = []
    model.apply(lambda module: seen.append(type(module).__name__))
    assert seen == ["HashTable", "Linear", "Model"]
    assert not model.eval().table.training
    assert model.train().table.training
    assert model.to(torch.float64).top.weight.dtype == torch.float64
    assert list(model.state_dict()) == ["top.weight", "top.bias"]
    model.load_state_dict(model.state_dict())
    model.requires_grad_(requires_grad=False).zero_grad()
    assert [name for name, _ in model.named_modules()] == ["", "table", "top"]
    assert list(model.table.children()) == []
    assert model.table.lookup(ids(1), child="b").tolist() == [[1, 1]]
    assert "HashTable('hashtable', 1 ids" in repr(model)
    assert len(list(model.parameters())) == 2


# Updates


def test_only_one_update_at_a_time() -> None:
    table = HashTable([1], name="t")
    update = table.begin(most=0, expected=0)
    changes: list[Callable[[], object]] = [
        lambda: table.begin(most=0, expected=0),
        lambda: table.insert(ids(1), column(1)),
        lambda: table.delete(ids(1)),
        lambda: table.add_slot("s", [1]),
        lambda: table.reserve(1),
        table.clear,
    ]
    for change in changes:
        with pytest.raises(RuntimeError, match="'t' is being loaded or changed"):
            change()
    update.abort()
    for change in changes[1:]:
        change()


def test_nothing_shows_before_commit() -> None:
    table = HashTable([1], block_size=1)
    table.add_slot("s", [1], initializer=-1.0)
    table.insert(ids(1, 2), column(1, 2))
    table.insert(ids(1), column(10), slot="s")
    before = values(table), values(table, "s")
    update = table.begin(most=10, expected=3)
    assert "0 rows reserved, 0 indexed" in repr(update)
    layer = update.layer(frozenset({"embedding"}), 3)
    put(update, layer, 0, ids(1, 3, 3), embedding=column(5, 6, 7))
    update.dropped(4)
    assert "3 rows reserved, 3 indexed" in repr(update)
    assert (values(table), values(table, "s")) == before
    finish(update)
    assert (values(table), values(table, "s"), len(table)) == (*before, 2)
    counts = update.commit()
    assert counts == UpdateCounts(rows=3, new=1, replaced=1, duplicates=1, dropped=4)
    assert values(table) == {1: 5, 2: 2, 3: 7}
    assert values(table, "s") == {1: 10, 2: -1, 3: -1}


@pytest.mark.parametrize("finished", [True, False])
def test_an_aborted_update_leaves_no_trace(*, finished: bool) -> None:
    table = HashTable([1], block_size=1)
    table.add_slot("s", [1], initializer=-1.0)
    table.insert(ids(1, 2), column(1, 2))
    for _ in range(3):
        update = table.begin(most=300, expected=300)
        layer = update.layer(frozenset({"embedding"}), 300)
        put(update, layer, 0, torch.arange(300), embedding=torch.full((300, 1), 9.0))
        if finished:
            finish(update)
        update.abort()
        assert values(table) == {1: 1, 2: 2}
        assert values(table, "s") == {1: -1, 2: -1}
        table.insert(ids(1), column(1), slot="s")
        table.insert(ids(1), column(-1), slot="s")
    assert capacity(table) < 50


@pytest.mark.parametrize("finishing", [True, False])
def test_an_update_that_brings_nothing_touches_nothing_that_lookups_use(*, finishing: bool) -> None:
    """It once moved rows within the index in use: lookups gave other ids' rows."""
    table = HashTable([1], block_size=1)
    table.insert(torch.arange(100), torch.arange(100.0)[:, None])
    table.delete(torch.arange(40))
    table.insert(torch.arange(1000, 1200), torch.zeros(200, 1))
    table.delete(torch.arange(1000, 1200))
    expected = {n: n for n in range(40, 100)}
    update = table.begin(most=5, expected=5)
    layer = update.layer(frozenset({"embedding"}), 5)
    update.reserve(layer, 5, 0)  # rows of which all are refused
    for wave in update.finish(threads=1):
        for job in wave:
            job()
            assert values(table) == expected
    if finishing:
        assert update.commit() == UpdateCounts(rows=0, new=0, replaced=0, duplicates=0, dropped=0)
    else:
        update.abort()
    assert values(table) == expected
    assert content(table).keys() == expected.keys()


def test_later_layers_win_and_leave_what_they_do_not_bring() -> None:
    table = HashTable([1])
    for slot in "ab":
        table.add_slot(slot, [1], initializer=-1.0)
    table.insert(ids(1, 2), column(1, 2))
    table.insert(ids(1, 2), column(10, 20), slot="a")
    update = table.begin(most=7, expected=7)
    lower = update.layer(frozenset({"embedding", "a"}), 2)
    upper = update.layer(frozenset({"b"}), 2)
    # Rows of the upper layer arrive first, and the run of the higher rank before the other.
    put(update, upper, 1, ids(2, 3), b=column(7, 8))
    put(update, lower, 6, ids(3, 4), embedding=column(3, 4), a=column(30, 40))
    put(update, lower, 5, ids(1, 4, 5), embedding=column(5, 6, 7), a=column(50, 60, 70))
    finish(update, threads=2)
    counts = update.commit()
    assert counts == UpdateCounts(rows=7, new=3, replaced=2, duplicates=2, dropped=0)
    assert values(table) == {1: 5, 2: 2, 3: 3, 4: 4, 5: 7}
    assert values(table, "a") == {1: 50, 2: 20, 3: 30, 4: 40, 5: 70}
    assert values(table, "b") == {1: -1, 2: 7, 3: 8, 4: -1, 5: -1}


def test_a_layer_that_fills_brings_no_ids() -> None:
    table = HashTable([1])
    table.add_slot("a", [1], initializer=-1.0)
    table.insert(ids(1, 2), column(1, 2))
    update = table.begin(most=5, expected=5)
    lower = update.layer(frozenset({"embedding"}), 1)
    upper = update.layer(frozenset({"a"}), 4)
    update.fill(upper)
    put(update, lower, 0, ids(3), embedding=column(3))
    put(update, upper, 1, ids(2, 3, 4, 5), a=column(20, 30, 40, 50))
    finish(update, threads=2)
    counts = update.commit()
    assert counts == UpdateCounts(rows=2, new=1, replaced=1, duplicates=0, dropped=2)
    assert values(table) == {1: 1, 2: 2, 3: 3}
    assert values(table, "a") == {1: -1, 2: 20, 3: 30}


def test_a_layer_that_fills_an_empty_table_leaves_it_empty() -> None:
    table = HashTable([1])
    update = table.begin(most=2, expected=2)
    update.fill(update.layer(frozenset({"embedding"}), 2))
    put(update, 0, 0, ids(1, 2), embedding=column(1, 2))
    finish(update, threads=1)
    counts = update.commit()
    assert counts == UpdateCounts(rows=0, new=0, replaced=0, duplicates=0, dropped=2)
    assert values(table) == {}
    table.insert(ids(7), column(7))
    assert values(table) == {7: 7}


@pytest.mark.parametrize("ends", ["commit", "abort"])
def test_children_that_are_cleared_show_it_at_the_commit(ends: str) -> None:
    table = HashTable([1], block_size=2, coalesced=True, children=["a", "b"])
    for child in "ab":
        table.insert(ids(1, 2, 3), column(1, 2, 3), child=child)
    update = table.begin(most=2, expected=2)
    update.clear(["a"])
    layer = update.layer(frozenset({"embedding"}), 2)
    first = update.reserve(layer, 2, 0)
    update.view("id", first, 2).copy_(ids(3, 4))
    update.view("embedding", first, 2).copy_(column(30, 40))
    update.admit("a", first, 2, gen_slice())
    jobs = update.index_jobs(layer, first, 2, None, threads=1)
    update.indexed(layer, [job() for job in jobs])
    finish(update, threads=2)
    assert sorted(table.ids("a").tolist()) == [1, 2, 3]
    if ends == "abort":
        update.abort()
        assert sorted(table.ids("a").tolist()) == [1, 2, 3]
        return
    counts = update.commit()
    wanted = UpdateCounts(rows=2, new=2, replaced=0, duplicates=0, dropped=0, cleared=3)
    assert counts == wanted
    assert table.lookup(ids(1, 2, 3, 4), child="a").flatten().tolist() == [0, 0, 30, 40]
    assert table.lookup(ids(1, 2, 3), child="b").flatten().tolist() == [1, 2, 3]
    assert len(table) == 5


def test_ids_that_stay_are_theirs_if_others_are_cleared_and_none_come_in() -> None:
    table = HashTable([1], block_size=2, coalesced=True, children=["a", "b"])
    for child in "ab":
        table.insert(ids(1, 2, 3), column(1, 2, 3), child=child)
    update = table.begin(most=100, expected=100)  # more than there is memory for ids
    update.clear(["a"])
    update.layer(frozenset({"embedding"}), 0)
    finish(update, threads=1)
    assert update.commit().cleared == 3
    assert sorted(table.ids("b").tolist()) == [1, 2, 3]
    assert not len(table.ids("a"))


def test_of_many_ids_those_of_a_child_go_and_those_that_are_unknown_stay_away() -> None:
    count = 300_000  # more than one part of an index has, and than one step takes
    table = HashTable([1], coalesced=True, children=["a", "b"])
    table.add_slot("s", [1])
    many = torch.arange(count)
    for child in "ab":
        table.insert(many, many.view(-1, 1).float(), child=child)
    update = table.begin(most=count, expected=count)
    update.clear(["a"])
    layer = update.layer(frozenset({"s"}), count)
    update.fill(layer)
    first = update.reserve(layer, count, 0)
    update.view("id", first, count).copy_(many + count // 2)
    update.view("s", first, count).fill_(1)
    update.admit("b", first, count, gen_slice())
    jobs = update.index_jobs(layer, first, count, None, threads=3)
    update.indexed(layer, [job() for job in jobs])
    finish(update, threads=3)
    counts = update.commit()
    half = count // 2
    assert counts == UpdateCounts(
        rows=half, new=0, replaced=half, duplicates=0, dropped=half, cleared=count
    )
    assert not len(table.ids("a"))
    assert table.ids("b").sort().values.equal(many)
    assert table.lookup(many, child="b").flatten().equal(many.float())
    assert table.lookup(many, "s", "b").flatten().equal((many >= half).float())


def test_a_lookup_goes_on_in_the_table_that_is_being_cleared() -> None:
    table = HashTable([1])
    table.insert(ids(1), column(1))
    update = table.begin(most=0, expected=0)
    update.clear(["hashtable"])
    finish(update, threads=1)
    assert values(table) == {1: 1}
    assert update.commit().cleared == 1
    assert values(table) == {}


def test_admit_encodes_ids_and_says_which_are_outside_the_claimed_slice() -> None:
    table = HashTable([1], coalesced=True, children=["a", "b"])
    update = table.begin(most=4, expected=4)
    update.layer(frozenset(), 4)
    first = update.reserve(0, 4, 0)
    view = update.view("id", first, 4)
    view.copy_(ids(1, 2, 13, -1))
    refused, dropped = update.admit("b", first, 4, Slice(1, 3, 10))
    assert refused is not None
    assert (refused.tolist(), dropped) == ([False, False, True, True], 2)
    assert view.tolist() == [encode_id(id_, 1) for id_ in (1, 2, 13, -1)]
    refused, dropped = update.admit("a", first, 1, gen_slice())
    assert (refused, dropped) == (None, 0)
    assert view[0].item() == 1
    update.abort()


def test_select_picks_the_rows_that_are_wanted() -> None:
    update = HashTable([1]).begin(most=0, expected=0)
    some = np.array([1, 2, 13, 4, -1], np.int64)
    rows, kept, dropped = update.select("hashtable", some, Slice(0, 4, 10), Slice(0, 1, 2))
    assert (rows.tolist(), kept.tolist(), dropped) == ([1], [2], 2)
    update.abort()


def test_no_more_rows_than_were_announced_can_be_reserved() -> None:
    table = HashTable([1])
    update = table.begin(most=3, expected=1)
    layer = update.layer(frozenset(), 3)
    update.reserve(layer, 2, 0)
    with pytest.raises(RuntimeError, match="more rows than were announced"):
        update.reserve(layer, 2, 2)
    update.abort()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("held", [50, 70_000, 200_000])
@pytest.mark.parametrize("loaded", [50, 70_000])
def test_ids_of_an_update_join_those_of_a_table_of_any_size(
    held: int, loaded: int, threads: int
) -> None:
    table = HashTable([1])
    table.add_slot("old", [1])
    before = torch.arange(held) * 977 - 10**6
    table.insert(before, torch.ones(held, 1), "old")
    new = torch.arange(held - loaded // 2, held - loaded // 2 + loaded) * 977 - 10**6
    update = table.begin(most=loaded, expected=loaded)
    layer = update.layer(frozenset({"embedding"}), loaded)
    put(update, layer, 0, new, embedding=torch.full((loaded, 1), 2.0))
    finish(update, threads)
    counts = update.commit()
    again = int(torch.isin(new, before).sum())
    assert (counts.new, counts.replaced) == (loaded - again, again)
    assert len(table) == held + loaded - again
    assert (table(new) == 2).all()
    assert torch.equal(table.lookup(new, "old")[:, 0], torch.isin(new, before).float())
    assert torch.equal(table(before)[:, 0], 2 * torch.isin(before, new).float())
    assert (table.lookup(before, "old") == 1).all()


def test_an_update_that_is_not_finished_cannot_be_committed() -> None:
    table = HashTable([1])
    update = table.begin(most=0, expected=0)
    with pytest.raises(RuntimeError, match="commit before finish"):
        update.commit()
    update.abort()


def test_a_table_has_a_largest_number_of_rows() -> None:
    table = HashTable([1])
    for most in (2**40, 2**62):
        with pytest.raises(MemoryError):
            table.begin(most=most, expected=0)
    table.insert(ids(1), column(1))  # the failed ones do not count as under way


@pytest.mark.gpu
def test_rows_live_on_the_device_that_was_named() -> None:
    table = HashTable([2], block_size=2, device="cuda")
    table.add_slot("s", [], initializer=1.0)
    table.insert(ids(1, 2, 3), filled((3, 2), torch.float32).cuda())
    table.insert(ids(3, 4, 5), filled((3, 2), torch.float32, 1).cuda())
    assert table.rows().device.type == table(ids(1)).device.type == "cuda"
    assert bits(table(ids(1, 3, 9, 5).cuda())) == (
        bits(filled((3, 2), torch.float32)[0])
        + bits(filled((3, 2), torch.float32, 1)[0])
        + bytes(8)
        + bits(filled((3, 2), torch.float32, 1)[2])
    )
    assert table.rows("s").tolist() == [1.0] * 5
    assert table.delete(ids(1).cuda()) == 1


def test_a_copy_of_a_table_shares_no_memory_with_it() -> None:
    table = HashTable([1])
    table.insert(ids(1), column(1))
    other = copy.copy(table)
    table.insert(ids(2), column(2))
    other.insert(ids(3), column(3))
    assert table.ids().tolist() == [1, 2]
    assert other.ids().tolist() == [1, 3]
    assert other.lookup(ids(1, 2, 3)).flatten().tolist() == [1.0, 0.0, 3.0]
    assert copy.deepcopy(table).rows().flatten().tolist() == [1.0, 2.0]


@pytest.mark.parametrize("many", [2**62, 2**40])
def test_more_rows_than_there_can_be_are_refused(many: int) -> None:
    table = HashTable([1 << 20])
    with pytest.raises(MemoryError):
        table.reserve(many)
    table.insert(ids(1), torch.ones(1, 1 << 20))
    assert len(table) == 1


def test_a_shape_is_a_sequence_of_sizes() -> None:
    with pytest.raises(TypeError, match=r"as \[16\], got 16"):
        HashTable(16)  # type: ignore[arg-type]  # the very thing


def test_rows_of_a_segment_that_was_let_go_are_not_counted_any_more() -> None:
    """And who still looks at the table as it was finds what was there."""
    table = HashTable([2], block_size=1)
    table.insert(torch.tensor([0]), torch.zeros(1, 2))
    many = torch.arange(1, 61)
    table.insert(many, many[:, None].expand(60, 2).float())
    before = table._state
    table.delete(many)
    assert (table._state.end, len(table._state.segments.items)) == (1, 1)
    table.insert(-many, -many[:, None].expand(60, 2).float())
    rows, missing = before.find(many.numpy())
    assert missing == 0
    assert before.gather("embedding", rows)[:, 0].tolist() == many.tolist()
    assert table(-many)[:, 0].tolist() == (-many).tolist()
    assert not table.contains(many).any()


def test_a_table_that_is_loaded_again_and_again_does_not_number_ever_more_rows() -> None:
    """Rows at its beginning that stay must not keep the holes behind them."""
    table = HashTable([1], block_size=1)
    table.insert(torch.arange(20), torch.zeros(20, 1))
    many = torch.arange(100, 150)
    for turn in range(30):
        table.insert(many, torch.full((50, 1), float(turn)))
        assert table._state.end <= 4 * len(table)
    assert table(torch.tensor([100, 149, 0]))[:, 0].tolist() == [29.0, 29.0, 0.0]
    assert table.contains(torch.arange(20)).all()
