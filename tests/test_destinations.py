"""Tensors of every kind get the right values, or are refused before anything is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from asyncloader import HashTable, Loader, PlanError, Slice
from tests.oracle import DTYPES, flat_bytes, write_checkpoint
from tests.support import data, poison, raw, rows_in, rows_on_disk, table_for, unchanged

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from torch import Tensor

MATRIX = torch.arange(1.0, 13.0).view(3, 4)

# Each makes a 3 x 4 tensor of zeros that lies in memory in its own way.
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.zeros(3, 4),
    "transposed": lambda: torch.zeros(4, 3).T,
    "every second column": lambda: torch.zeros(3, 8)[:, ::2],
    "every second row": lambda: torch.zeros(6, 4)[::2],
    "some columns": lambda: torch.zeros(3, 9)[:, 3:7],
    "the middle of a larger one": lambda: torch.zeros(5, 4)[1:4],
    "at an odd address": lambda: torch.frombuffer(
        bytearray(49), dtype=torch.float32, offset=1
    ).view(3, 4),
    "rows with padding": lambda: torch.zeros(100).as_strided((3, 4), (17, 2), 5),
    "permuted": lambda: torch.zeros(4, 2, 3).permute(2, 0, 1)[:, :, 1],
    "a parameter": lambda: torch.nn.Parameter(torch.zeros(3, 4)),
    "a transposed parameter": lambda: torch.nn.Parameter(torch.zeros(4, 3).T),
    "a view of a leaf": lambda: torch.zeros(4, 3, requires_grad=True).detach().T,
    "real parts": lambda: torch.zeros(3, 4, dtype=torch.complex64).real,
    "negated imaginary parts": lambda: torch.zeros(3, 4, dtype=torch.complex64).conj().imag,
    "shared with numpy": lambda: torch.from_numpy(torch.zeros(3, 4).numpy()),
    "in shared memory": lambda: torch.zeros(3, 4).share_memory_(),  # type: ignore[no-untyped-call]
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("chunk_bytes", [4, 20])
async def test_a_tensor_gets_its_values_however_it_lies_in_memory(
    tmp_path: Path, make: Callable[[], Tensor], chunk_bytes: int
) -> None:
    write_checkpoint(tmp_path, {}, {"w": MATRIX})
    tensor = make()

    await Loader(tmp_path, tensors={"w": tensor}, chunk_bytes=chunk_bytes).aload()

    assert raw(tensor) == raw(MATRIX)


async def test_what_lies_around_a_view_is_not_touched(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"w": MATRIX, "v": torch.ones(3)})
    whole = torch.full((5, 9), -1.0)
    line = torch.full((9,), -1.0)

    await Loader(tmp_path, tensors={"w": whole[1:4, 3:7], "v": line[3:6]}).aload()

    expected = torch.full((5, 9), -1.0)
    expected[1:4, 3:7] = MATRIX
    assert torch.equal(whole, expected)
    assert line.tolist() == [-1, -1, -1, 1, 1, 1, -1, -1, -1]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
async def test_every_dtype_is_loaded_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    count = 35 * dtype.itemsize
    high = 2 if dtype == torch.bool else 256
    stored = torch.randint(0, high, (count,), dtype=torch.uint8).view(dtype).view(5, 7)
    write_checkpoint(tmp_path, {}, {"plain": stored, "turned": stored})
    tensors = {"plain": torch.zeros(5, 7, dtype=dtype), "turned": torch.zeros(7, 5, dtype=dtype).T}

    report = await Loader(tmp_path, tensors=tensors, chunk_bytes=10).aload()

    assert [raw(tensor) for tensor in tensors.values()] == [raw(stored)] * 2
    assert report.tensors == {"plain": "loaded", "turned": "copied"}


async def test_a_conjugated_view_gets_the_right_values(tmp_path: Path) -> None:
    stored = torch.randn(3, 2, dtype=torch.complex64)
    write_checkpoint(tmp_path, {}, {"w": stored})
    memory = torch.zeros(3, 2, dtype=torch.complex64)

    await Loader(tmp_path, tensors={"w": memory.conj()}).aload()

    assert torch.equal(memory, stored.conj().resolve_conj())


@pytest.mark.parametrize(
    "stored",
    [torch.tensor(7.0), torch.empty(0), torch.empty(3, 0, 2), torch.ones(1), torch.ones(1, 1, 1)],
    ids=lambda tensor: str(tuple(tensor.shape)),
)
async def test_scalars_and_empty_tensors_are_loaded(tmp_path: Path, stored: Tensor) -> None:
    write_checkpoint(tmp_path, {}, {"w": stored, "other": torch.ones(3)})
    tensors = {"w": torch.zeros_like(stored), "other": torch.zeros(3)}

    report = await Loader(tmp_path, tensors=tensors).aload()

    assert raw(tensors["w"]) == raw(stored)
    assert report.tensors == {"w": "loaded", "other": "loaded"}


async def test_a_single_element_may_have_any_stride(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.full((1, 1), 7.0), "v": torch.tensor(8.0)})
    memory = torch.zeros(9)
    tensors = {"w": memory.as_strided((1, 1), (5, 3), 2), "v": memory[4:][1]}

    await Loader(tmp_path, tensors=tensors).aload()

    assert memory.tolist() == [0, 0, 7, 0, 0, 8, 0, 0, 0]


# --- autograd


@pytest.mark.parametrize("layout", ["a parameter", "a transposed parameter"])
async def test_a_parameter_stays_a_leaf_that_takes_gradients(tmp_path: Path, layout: str) -> None:
    write_checkpoint(tmp_path, {}, {"w": MATRIX})
    parameter = LAYOUTS[layout]()

    await Loader(tmp_path, tensors={"w": parameter}).aload()
    (parameter * parameter).sum().backward()  # type: ignore[no-untyped-call]

    assert parameter.is_leaf
    assert parameter.requires_grad
    assert parameter.grad is not None
    assert torch.equal(parameter.grad, 2 * MATRIX)


@pytest.mark.parametrize("layout", ["a parameter", "a transposed parameter"])
async def test_autograd_notices_that_a_value_it_has_saved_was_overwritten(
    tmp_path: Path, layout: str
) -> None:
    write_checkpoint(tmp_path, {}, {"w": MATRIX})
    parameter = LAYOUTS[layout]()
    loss = (parameter * parameter).sum()

    await Loader(tmp_path, tensors={"w": parameter}).aload()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # type: ignore[no-untyped-call]


async def test_only_what_is_written_to_gets_a_new_version(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"w": MATRIX})
    tensors = {"w": torch.zeros(3, 4), "missing": torch.zeros(3, 4)}
    versions = {name: tensor._version for name, tensor in tensors.items()}

    await Loader(tmp_path, tensors=tensors).aload()

    assert tensors["w"]._version > versions["w"]
    assert tensors["missing"]._version == versions["missing"]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every second column"])
async def test_tensors_made_in_inference_mode_are_loaded(tmp_path: Path, layout: str) -> None:
    write_checkpoint(tmp_path, {}, {"w": MATRIX})
    with torch.inference_mode():
        tensor = LAYOUTS[layout]()

    await Loader(tmp_path, tensors={"w": tensor}).aload()

    assert tensor.is_inference()
    with torch.inference_mode():
        assert raw(tensor) == raw(MATRIX)


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_a_load_within_inference_mode_is_right(tmp_path: Path, layout: str) -> None:
    content = data(list(range(100)))
    write_checkpoint(tmp_path, {"t": content, "u": content}, {"w": MATRIX})
    half = Slice(0, 50, 100)
    with torch.inference_mode():
        tensor = LAYOUTS[layout]()
        table, part = table_for(content), table_for(content, name="u", slice=half)
        Loader(tmp_path, {"t": table, "u": part}, {"w": tensor}).load()
        assert raw(tensor) == raw(MATRIX)
        assert raw(table(content.ids)) == raw(content.slots["embedding"])

    assert rows_in(table) == rows_on_disk(content)
    assert rows_in(part) == rows_on_disk(content, keep=half.accepts)
    for held in table, part:
        held.insert(torch.tensor([3, 103]), torch.full((2, 2), -1.0))
        assert held(torch.tensor([2, 3, 103])).tolist() == [[5, 6], [-1, -1], [-1, -1]]


async def test_the_state_of_a_module_with_tied_weights_is_loaded(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(4, 4)
            self.second = torch.nn.Linear(4, 4)
            self.second.weight = self.first.weight

    torch.manual_seed(0)
    trained, fresh = Tied(), Tied()
    write_checkpoint(tmp_path, {}, trained.state_dict())

    report = await Loader(tmp_path, tensors=fresh.state_dict(), strict=True).aload()

    for name, value in trained.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value)
    assert report.tensors["first.weight"] == "shared with 'second.weight'"
    assert report.tensors["second.weight"] == "loaded"


# --- memory that tensors share


async def test_of_one_memory_under_several_names_the_last_wins_and_is_read_once(
    tmp_path: Path,
) -> None:
    write_checkpoint(tmp_path, {}, {"a": torch.ones(4), "b": torch.ones(4) * 2})
    memory = torch.zeros(4)

    report = await Loader(tmp_path, tensors={"a": memory, "b": memory.view(4)}).aload()

    assert memory.tolist() == [2, 2, 2, 2]
    assert report.tensors == {"a": "shared with 'b'", "b": "loaded"}
    assert report.bytes_read == 16


async def test_views_that_interleave_are_loaded_side_by_side(tmp_path: Path) -> None:
    columns = {str(number): torch.full((5,), float(number)) for number in range(3)}
    write_checkpoint(tmp_path, {}, columns)
    matrix = torch.zeros(5, 3)

    await Loader(
        tmp_path, tensors={name: matrix[:, int(name)] for name in columns}, chunk_bytes=8
    ).aload()

    assert matrix.tolist() == [[0, 1, 2]] * 5


@pytest.mark.parametrize(
    "views",
    [
        lambda memory: (memory[:4], memory[2:6]),
        lambda memory: (memory[::2][:4], memory[3:7]),
        lambda memory: (memory.view(2, 4)[:, 1], memory[1:3]),
        lambda memory: (memory[:4], memory.view(torch.int32)[:4]),
        lambda memory: (memory, memory[1:2]),
    ],
    ids=["shifted", "every second", "a column", "another dtype", "one of many"],
)
async def test_views_that_overlap_in_part_are_an_error_before_anything_is_written(
    tmp_path: Path, views: Callable[[Tensor], Iterable[Tensor]]
) -> None:
    memory = poison(torch.empty(8))
    tensors = dict(zip("ab", views(memory), strict=True))
    write_checkpoint(
        tmp_path, {}, {name: torch.ones_like(tensor) for name, tensor in tensors.items()}
    )

    with unchanged(tensors=tensors), pytest.raises(PlanError) as caught:
        await Loader(tmp_path, tensors=tensors).aload()

    [problem] = caught.value.problems
    assert all(fact in problem for fact in ["'a'", "'b'", "overlap"])


async def test_views_that_overlap_may_be_loaded_one_at_a_time(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {}, {"a": torch.ones(4), "b": torch.ones(4)})
    memory = torch.zeros(6)
    tensors = {"a": memory[:4], "b": memory[2:]}

    await Loader(tmp_path, tensors=tensors, filter_func=lambda _: {"b": {"b": []}}).aload()

    assert memory.tolist() == [0, 0, 1, 1, 1, 1]


# --- what cannot be filled


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: torch.zeros(1).expand(3), "expanded"),
        (lambda: torch.zeros(3, 1).expand(3, 4), "expanded"),
        (lambda: torch.zeros(5).unfold(0, 3, 1), "one place in memory"),
        (lambda: torch.zeros(9).as_strided((2, 3), (2, 1)), "one place in memory"),
        (lambda: torch.zeros(3, device="meta"), "plain strided"),
        (lambda: torch.eye(3).to_sparse(), "plain strided"),
        (lambda: torch.zeros(3, dtype=torch.complex128), "complex128"),
    ],
    ids=[
        "expanded", "expanded columns", "sliding windows", "overlapping rows", "meta", "sparse",
        "complex128",
    ],
)  # fmt: skip
def test_a_tensor_that_cannot_be_filled_is_refused_at_construction(
    make: Callable[[], Tensor], says: str
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        Loader("anywhere", tensors={"the name": make()})

    assert "'the name'" in str(caught.value)


@pytest.mark.parametrize("value", [None, 1.0, [1.0], torch.zeros(3).numpy()], ids=type)
def test_what_is_no_tensor_is_refused_at_construction(value: object) -> None:
    with pytest.raises(TypeError, match="'the name'"):
        Loader("anywhere", tensors={"the name": value})  # type: ignore[dict-item]


@pytest.mark.parametrize("value", [None, torch.zeros(3), {}, "t"], ids=type)
def test_what_is_no_table_is_refused_at_construction(value: object) -> None:
    with pytest.raises(TypeError, match="'the name'"):
        Loader("anywhere", {"the name": value})  # type: ignore[dict-item]


def test_two_tables_that_take_the_same_ids_are_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="'one' and 'other' both take the ids of 'same'"):
        Loader(
            "anywhere", {"one": HashTable([1], name="same"), "other": HashTable([1], name="same")}
        )


def test_a_tensor_of_a_tables_name_is_refused_at_construction() -> None:
    with pytest.raises(ValueError, match="'same'"):
        Loader("anywhere", {"one": HashTable([1], name="same")}, {"same": torch.zeros(1)})


# --- another device


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "every second column"])
@pytest.mark.parametrize("chunk_bytes", [4, 20, 1 << 20])
async def test_a_tensor_on_a_gpu_gets_its_values(
    tmp_path: Path, layout: str, chunk_bytes: int
) -> None:
    write_checkpoint(tmp_path, {}, {"w": MATRIX})
    with torch.device("cuda"):
        tensor = LAYOUTS[layout]()

    report = await Loader(tmp_path, tensors={"w": tensor}, chunk_bytes=chunk_bytes).aload()

    assert raw(tensor.cpu()) == raw(MATRIX)
    assert report.tensors == {"w": "copied"}


@pytest.mark.gpu
@pytest.mark.parametrize("mine", [(0, 65536, 65536), (0, 40, 100)], ids=str)
async def test_a_table_on_a_gpu_gets_its_rows(tmp_path: Path, mine: tuple[int, int, int]) -> None:
    content = data(list(range(-50, 50)), exp_avg=1)
    write_checkpoint(tmp_path, {"t": content}, {}, ranks=2)
    wanted = Slice(*mine)
    table = HashTable([2], device="cuda", slice=wanted, name="t")
    table.add_slot("exp_avg", [1])

    await Loader(tmp_path, {"t": table}, chunk_bytes=100).aload()

    assert table.rows().device.type == "cuda"
    assert rows_in(table) == rows_on_disk(content, keep=wanted.accepts)
    found = table(content.ids.cuda())
    here = torch.tensor([wanted.accepts(id_) for id_ in content.ids.tolist()])
    expected = content.slots["embedding"] * here[:, None]
    assert flat_bytes(found).equal(flat_bytes(expected))


def test_what_is_passed_in_the_wrong_place_is_an_error_that_says_where_it_goes() -> None:
    with pytest.raises(TypeError, match="dense tensors are passed as tensors="):
        Loader("somewhere", {"w": torch.ones(1)})  # type: ignore[dict-item]  # the very thing
    with pytest.raises(TypeError, match="of a module, targets"):
        Loader("somewhere", tensors=torch.nn.Linear(1, 1))  # type: ignore[arg-type]  # likewise
    with pytest.raises(TypeError, match=r"pass torch.tensor\(3\)"):
        Loader("somewhere", tensors={"step": 3})  # type: ignore[dict-item]  # likewise
    with pytest.raises(TypeError, match="make it flat"):
        Loader("somewhere", tensors={"state": {}})  # type: ignore[dict-item]  # likewise


def test_a_table_that_nobody_has_named_is_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    Loader("somewhere", {"item_emb": HashTable([2], name="item_emb"), "hashtable": HashTable([2])})
    assert not caplog.messages
    Loader("somewhere", {"item_emb": HashTable([2])})
    assert "hashtables['item_emb'] is called 'hashtable' on disk" in caplog.text
