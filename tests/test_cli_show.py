"""`asyncloader show`."""

from __future__ import annotations

import io
import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from safetensors.torch import save_file

from asyncloader._checkpoint.manifest import stored_tensor
from asyncloader._loading.opening import open_session
from asyncloader._loading.progress import Meter
from asyncloader._tools.scanning import scan
from asyncloader._tools.showing import FoundId, ShownTable, ShownTensor, look_at, look_for
from asyncloader._tools.values import Statistics, combine, measure, values_of
from asyncloader.cli._app import run as run_here
from asyncloader.cli._content_views import id_view, table_view, tensor_view
from asyncloader.cli._terminal import Numbers, number_text
from tests.checkpoints import GENUINE, LIMITS
from tests.forks import python
from tests.oracle import (
    DTYPES,
    Slice,
    read_checkpoint,
    read_parts,
    sparse_block,
    split_slices,
    write_checkpoint,
    write_ranks,
)
from tests.support import data, nothing_left_behind

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType
    from torch import Tensor

    from asyncloader._tools.values import Value

NAN, INF = math.nan, math.inf


async def tensor(path: Path, name: str, *, rows: int = 5) -> ShownTensor:
    with nothing_left_behind():
        found = await look_at(str(path), name, rows=rows, options=LIMITS, progress=None)
    assert isinstance(found, ShownTensor)
    return found


async def table(path: Path, name: str) -> ShownTable:
    found = await look_at(str(path), name, rows=5, options=LIMITS, progress=None)
    assert isinstance(found, ShownTable)
    return found


async def find(path: Path, name: str, id_: int) -> FoundId:
    with nothing_left_behind():
        return await look_for(str(path), name, id_, options=LIMITS, progress=None)


# Statistics.


def expected(values: Tensor) -> Statistics:
    """Say the same in the plainest way."""
    everything = values.double().reshape(-1).numpy()
    if not values.is_floating_point():
        everything = np.array(values.reshape(-1).tolist())
    finite = everything[np.isfinite(everything)].astype(np.float64)
    some = len(finite) > 0
    about: Any = pytest.approx
    most = max(abs(finite)) if some else 0.0  # what cancels out has lost as much as that
    return Statistics(
        min=about(finite.min()) if some else None,
        max=about(finite.max()) if some else None,
        mean=about(finite.mean(), rel=1e-9, abs=1e-9 + 1e-12 * most) if some else None,
        std=about(finite.std(), rel=1e-6, abs=1e-9 + 1e-12 * most) if some else None,
        count=len(everything),
        zeros=int((everything == 0).sum()),
        nans=int(np.isnan(everything).sum()),
        infinities=int(np.isinf(everything).sum()),
    )


def statistics(values: Tensor, *cuts: int) -> Statistics:
    parts = torch.tensor_split(values.reshape(-1), sorted(cuts)) if cuts else (values,)
    return combine([measure(part) for part in parts])


REAL = [dtype for dtype in DTYPES.values() if not dtype.is_complex]


@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_every_dtype_is_measured(dtype: torch.dtype) -> None:
    values = torch.arange(24).view(2, 3, 4).remainder(2 if dtype == torch.bool else 7).to(dtype)
    assert statistics(values) == expected(values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_what_is_not_finite_is_counted_apart(dtype: torch.dtype) -> None:
    values = torch.tensor([NAN, 1.0, -INF, 0.0, INF, -0.0, 3.0, NAN], dtype=dtype)
    found = statistics(values)
    assert found == expected(values)
    assert (found.nans, found.infinities, found.zeros) == (2, 2, 2)
    assert (found.min, found.max) == (0.0, 3.0)


@pytest.mark.parametrize("values", [[], [NAN, INF, -INF]])
def test_where_nothing_is_finite_there_is_no_range(values: list[float]) -> None:
    found = statistics(torch.tensor(values))
    assert (found.min, found.max, found.mean, found.std) == (None,) * 4
    assert found.count == len(values)


def test_whole_numbers_stay_exact() -> None:
    """As a float, the largest id would be another one."""
    found = statistics(torch.tensor([-(2**63), 2**63 - 1, 0]))
    assert (found.min, found.max) == (-(2**63), 2**63 - 1)
    huge = torch.tensor([2**64 - 1], dtype=torch.uint64)
    assert statistics(huge).max == 2**64 - 1


def test_numbers_near_the_largest_do_not_warn() -> None:
    values = torch.tensor([1.7e308, -1.7e308, 1.7e308], dtype=torch.float64)
    for cuts in ((), (1, 2)):
        found = statistics(values, *cuts)
        assert (found.min, found.max, found.std) == (-1.7e308, 1.7e308, INF)


async def test_complex_numbers_are_not_measured(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(3, dtype=torch.complex64)}, tmp_path / "a.safetensors")
    assert (await tensor(tmp_path / "a.safetensors", "w")).statistics is None


@given(
    st.lists(st.floats(width=32, allow_subnormal=False) | st.just(0.0), max_size=30),
    st.lists(st.integers(0, 30), max_size=5),
)
def test_pieces_say_the_same_as_the_whole(values: list[float], cuts: list[int]) -> None:
    tensor_ = torch.tensor(values, dtype=torch.float32).clamp(-1e15, 1e15)
    assert statistics(tensor_, *cuts) == expected(tensor_)


# Reading in pieces.


@pytest.mark.parametrize("window", [4, 7, 64, 1000])
async def test_pieces_cover_all_elements_once_and_in_order(tmp_path: Path, window: int) -> None:
    content = data(range(30), width=3)
    write_checkpoint(tmp_path, {"t": content}, {}, ranks=4)
    whole = read_checkpoint(tmp_path)[0]["t"].slots["embedding"]
    meter = Meter(0)
    async with open_session(str(tmp_path), LIMITS) as session:
        catalog = await session.catalog()
        shards = {part.place.shard for part in catalog.tables["t"]["embedding"]}
        manifest = await session.manifest(catalog, shards)
        stored = stored_tensor(manifest, "t@embedding")
        pieces = await scan(
            session,
            stored.blocks,
            lambda _number, _position, view: np.frombuffer(view, np.float32).tolist(),
            meter=meter,
            chunk_bytes=4 * window,
        )
    assert [value for piece in pieces for value in piece] == whole.reshape(-1).tolist()
    assert meter.read == 30 * 3 * 4
    assert max(map(len, pieces)) <= window


async def test_a_row_larger_than_a_window_is_read_in_pieces(tmp_path: Path) -> None:
    wide = torch.arange(5 << 20, dtype=torch.float32).view(1, -1)
    save_file({"wide": wide}, tmp_path / "any.safetensors")
    found = await tensor(tmp_path / "any.safetensors", "wide")
    assert found.statistics is not None
    assert (found.statistics.max, found.statistics.count) == (wide.max().item(), wide.numel())
    [row] = found.rows
    assert row.values == tuple(wide[0, :4096].tolist())
    assert row.omitted == wide.numel() - 4096


# What is shown.


@pytest.mark.parametrize("checkpoint", ["optim_slots", "small_4shards"])
async def test_each_tensor_of_a_genuine_checkpoint_is_shown(checkpoint: str) -> None:
    path = GENUINE / checkpoint
    tables, tensors = read_checkpoint(path)
    plain: dict[str, tuple[Tensor, list[int]]] = {
        name: (values, []) for name, values in tensors.items()
    }
    slots = {
        f"{name}@{slot}": (values, one.ids.tolist())
        for name, one in tables.items()
        for slot, values in one.slots.items()
    }
    for name, (values, ids) in (plain | slots).items():
        found = await tensor(path, name, rows=3)
        assert found.kind == ("slot" if name in slots else "tensor")
        assert found.statistics == expected(values)
        assert (found.dtype, found.shape) == (
            str(values.dtype).removeprefix("torch."),
            tuple(values.shape),
        )
        rows = values.reshape(len(values), -1) if values.dim() else values.reshape(1, 1)
        assert [row.values for row in found.rows] == [tuple(row.tolist()) for row in rows[:3]]
        assert [row.id for row in found.rows if row.id is not None] == ids[:3]


async def test_a_table_is_shown_slot_by_slot() -> None:
    path = GENUINE / "optim_slots"
    content = read_checkpoint(path)[0]["user_emb"]
    found = await table(path, "user_emb")
    assert (found.kind, found.ids) == ("table", len(content.ids))
    assert found.slots[0].name == "user_emb@id"
    assert {one.name: one.statistics for one in found.slots} == {
        f"user_emb@{slot}": expected(values)
        for slot, values in {"id": content.ids, **content.slots}.items()
    }
    assert found.bytes == sum(one.bytes for one in found.slots)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_values_of_every_dtype_are_shown(dtype: torch.dtype) -> None:
    shown = values_of(torch.tensor([0, 1, 1]).to(dtype))
    if dtype.is_complex:
        assert shown == ("0j", "(1+0j)", "(1+0j)")
    else:
        assert shown == (0, 1, 1)


def test_values_that_json_lacks_are_text() -> None:
    assert values_of(torch.tensor([[NAN, -INF], [INF, 2.5]])) == ("nan", "-inf", "inf", 2.5)


async def test_a_tensor_of_an_odd_shape_is_shown(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "empty": torch.zeros(3, 0),
        "deep": torch.arange(24.0).view(2, 3, 4),
    }
    write_checkpoint(tmp_path, {}, tensors)
    rows = {name: (await tensor(tmp_path, name)).rows for name in tensors}
    assert [row.values for row in rows["scalar"]] == [(2.5,)]
    assert rows["none"] == ()
    assert [row.values for row in rows["empty"]] == [()] * 3
    assert [row.values for row in rows["deep"]] == [
        tuple(range(12)),
        tuple(range(12, 24)),
    ]
    assert (await tensor(tmp_path, "deep", rows=0)).rows == ()


async def test_a_tensor_goes_before_a_slot_of_the_same_name(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, {"t": data([1]), "both": data([2])}, {"t@embedding": torch.ones(7), "both": NONE}
    )
    assert (await tensor(tmp_path, "t@embedding")).shape == (7,)
    assert (await tensor(tmp_path, "both")).shape == (0,)
    assert (await find(tmp_path, "both", 2)).found == 1
    found = await table(tmp_path, "t")
    assert [one.shape for one in found.slots] == [(1,), (1, 2)]


NONE = torch.zeros(0)


# Finding an id.


@pytest.mark.parametrize("checkpoint", ["optim_slots", "small_4shards"])
async def test_ids_of_a_genuine_checkpoint_are_found_with_their_rows(checkpoint: str) -> None:
    path = GENUINE / checkpoint
    for name, parts in read_parts(path)[0].items():
        for part in parts:
            for row in (0, len(part.ids) - 1):
                id_ = int(part.ids[row])
                found = await find(path, name, id_)
                assert (found.id, found.found, found.table) == (id_, 1, name)
                assert found.part == str(part.claim)
                assert {one.name: one.row.values for one in found.slots} == {
                    slot: tuple(rows[row].reshape(-1).tolist()) for slot, rows in part.slots.items()
                }
                assert {one.name: one.shape for one in found.slots} == {
                    slot: rows.shape[1:] for slot, rows in part.slots.items()
                }


async def test_an_id_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": data([1, 2])}, {}, ranks=2)
    assert await find(tmp_path, "t", 3) == FoundId(
        location=str(tmp_path), table="t", id=3, found=0, part=None, slots=()
    )


async def test_of_an_id_that_stands_there_twice_the_last_row_counts(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": data([5, 6, 5, 7, 5, 8])}, {})
    found = await find(tmp_path, "t", 5)
    content = read_checkpoint(tmp_path)[0]["t"]
    assert found.found == 3
    assert found.slots[0].row.number == 4
    assert found.slots[0].row.values == tuple(content.slots["embedding"][4].tolist())


async def test_of_two_parts_that_hold_an_id_the_later_counts(tmp_path: Path) -> None:
    """Slices of different sizes can both accept an id; a load takes the later part's row."""
    claims = [Slice(0, 4, 8), Slice(1, 4, 4)]
    ranks = [
        [
            sparse_block("t", "id", torch.tensor([9, 1]), rank=rank, ranks=2, claim=claim),
            sparse_block(
                "t", "embedding", torch.full((2, 1), rank + 1.0), rank=rank, ranks=2, claim=claim
            ),
        ]
        for rank, claim in enumerate(claims)
    ]
    write_ranks(tmp_path, ranks)
    found = await find(tmp_path, "t", 1)
    assert (found.found, found.part) == (2, str(claims[1]))
    assert found.slots[0].row.values == (2.0,)


async def test_rows_that_a_load_would_drop_are_not_found(tmp_path: Path) -> None:
    """Their part claims not to hold such ids."""
    odd = split_slices(2, 2)[1]
    write_ranks(
        tmp_path,
        [
            [
                sparse_block("t", "id", torch.tensor([2, 3]), claim=odd),
                sparse_block("t", "embedding", torch.ones(2, 1), claim=odd),
            ]
        ],
    )
    assert (await find(tmp_path, "t", 2)).found == 0
    assert (await find(tmp_path, "t", 3)).found == 1


async def test_ids_are_found_in_every_window(tmp_path: Path) -> None:
    count = (2 << 20) + 3
    ids = torch.arange(count)
    blocks = [sparse_block("t", "id", ids), sparse_block("t", "embedding", ids.view(-1, 1))]
    write_ranks(tmp_path, [blocks])
    for id_ in (0, (2 << 20) - 1, 2 << 20, count - 1):
        found = await find(tmp_path, "t", id_)
        assert (found.slots[0].row.number, found.slots[0].row.values) == (id_, (id_,))
    assert (await find(tmp_path, "t", count)).found == 0


async def test_of_a_slot_only_its_own_row_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a@b": data([-5], exp_avg=1)}, {})
    assert [one.name for one in (await find(tmp_path, "a@b", -5)).slots] == [
        "embedding",
        "exp_avg",
    ]
    assert [one.name for one in (await find(tmp_path, "a@b@exp_avg", -5)).slots] == ["exp_avg"]


async def test_a_table_without_rows_for_its_ids_is_an_error(tmp_path: Path) -> None:
    first, second = split_slices(65536, 2)
    blocks = [
        sparse_block("t", "id", torch.tensor([1]), claim=first),
        sparse_block("t", "embedding", torch.ones(1, 1), claim=second),
        sparse_block("u", "embedding", torch.ones(1, 1)),
    ]
    write_ranks(tmp_path, [blocks])
    with pytest.raises(ValueError, match="'t@embedding': has no part for slice"):
        raise ValueError(str(await failure(tmp_path, "t")))
    with pytest.raises(ValueError, match="table 'u' has no ids"):
        raise ValueError(str(await failure(tmp_path, "u")))


async def failure(path: Path, name: str) -> Exception:
    try:
        await find(path, name, 1)
    except Exception as error:  # noqa: BLE001  # whichever it is
        return error
    raise AssertionError("nothing failed")


# How it looks.


def drawn(view: RenderableType, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False, markup=False, emoji=False)
    console.print(view)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
async def test_nothing_is_wider_than_the_terminal(width: int) -> None:
    path = GENUINE / "optim_slots"
    views = [
        table_view(await table(path, "user_emb")),
        tensor_view(await tensor(path, "user_emb@embedding")),
        tensor_view(await tensor(path, "sparse_adamw_step")),
        tensor_view(await tensor(path, "sparse_adamw_beta1")),
        id_view(await find(path, "user_emb", int(read_checkpoint(path)[0]["user_emb"].ids[0]))),
    ]
    for text in (drawn(view, width) for view in views):
        assert max(map(cell_len, text.splitlines())) <= width


async def test_rows_are_shown_beside_their_ids() -> None:
    path = GENUINE / "optim_slots"
    content = read_checkpoint(path)[0]["user_emb"]
    text = drawn(tensor_view(await tensor(path, "user_emb@embedding", rows=2)), 200)
    lines = text.splitlines()[-2:]
    for row, line in enumerate(lines):
        values = content.slots["embedding"][row].tolist()
        assert line.split() == [
            str(row),
            str(int(content.ids[row])),
            *(number_text(value) for value in values),
        ]


async def test_what_is_odd_is_said(tmp_path: Path) -> None:
    content = data([5, 5])
    content.slots["embedding"][0, 0] = NAN
    content.slots["embedding"][1, 1] = INF
    write_checkpoint(tmp_path, {"t": content}, {})
    assert "1 NaN, 1 infinite" in drawn(table_view(await table(tmp_path, "t")), 120)
    assert "1 NaN, 1 infinite" in drawn(tensor_view(await tensor(tmp_path, "t@embedding")), 120)
    assert "2 times; the last one counts" in drawn(id_view(await find(tmp_path, "t", 5)), 120)


@pytest.mark.parametrize("width", [5, 11, 30, 80, 500])
def test_numbers_that_do_not_fit_are_counted(width: int) -> None:
    values: list[Value] = [1.5, -2.25, 1e-9, "nan", 12345678901234567890] * 4
    [line] = drawn(Numbers(values, 3, one_line=True), width).splitlines()
    assert cell_len(line) <= width
    if width >= 80:
        left = int(line.split("…")[1].split()[0])
        assert len(line.split("…")[0].split()) + left == len(values) + 3
    lines = drawn(Numbers(values, 3, one_line=False), max(width, 20)).splitlines()
    assert " ".join(lines[:-1]).split() == [number_text(value) for value in values]
    assert lines[-1].strip() == "… 3 more"


# The command.


def run(*arguments: str | Path) -> tuple[int, str, str]:
    done = python("-m", "asyncloader", "show", *arguments)
    return done.returncode, done.stdout, done.stderr


def test_json_is_what_the_oracle_reads() -> None:
    path = GENUINE / "optim_slots"
    code, out, err = run(path, "user_emb@embedding", "--rows", "4", "--json")
    assert (code, err) == (0, "")
    values = read_checkpoint(path)[0]["user_emb"].slots["embedding"]
    document: dict[str, Any] = json.loads(out)
    assert document["shape"] == list(values.shape)
    assert Statistics(**document["statistics"]) == expected(values)
    assert [row["values"] for row in document["rows"]] == values[:4].tolist()


@pytest.mark.parametrize("spelling", [["--id", "-5"], ["--id=-5"]])
def test_a_negative_id_is_no_option(spelling: list[str], tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"t": data([-5, 3])}, {})
    code, out, err = run(tmp_path, "t", *spelling, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["slots"][0]["row"]["values"] == [1.0, 2.0]


HASH = -(2**63) + 5


@pytest.mark.parametrize(
    "spelling", [str(HASH), str(HASH + 2**64), hex(HASH + 2**64), hex(HASH + 2**64).upper()]
)
def test_an_id_is_64_bits_however_it_is_spelled(
    spelling: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, {"t": data([HASH, 3])}, {})
    assert run_here(["show", str(tmp_path), "t", "--id", spelling, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert (document["id"], document["id_text"]) == (HASH, str(HASH))
    assert document["slots"][0]["row"]["id_text"] == str(HASH)


@pytest.mark.parametrize(
    "text", ["4.0", "", "0x", "1e3", str(2**64), str(-(2**63) - 1), "9" * 5000]
)
def test_what_is_no_id_is_refused(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_here(["show", "x", "t", f"--id={text}"]) == 2
    assert "is no id: that is a whole number of 64 bits" in capfd.readouterr().err


def test_whole_numbers_survive_programs_whose_numbers_are_doubles(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    big = [2**53 + 1, -(2**63), 7]
    write_checkpoint(tmp_path, {"t": data(big)}, {"w": torch.tensor([big]), "v": torch.tensor([7])})

    def document(name: str) -> Any:  # noqa: ANN401  # JSON
        assert run_here(["show", str(tmp_path), name, "--json"]) == 0
        return json.loads(capfd.readouterr().out)

    ids = document("t@id")
    assert [row["id_text"] for row in ids["rows"]] == list(map(str, big))
    assert document("t@embedding")["rows"][0]["id_text"] == str(big[0])
    w = document("w")
    assert w["rows"][0]["values_text"] == list(map(str, big))
    assert w["statistics"]["min_text"] == str(-(2**63))
    assert "values_text" not in document("v")["rows"][0]


def test_an_id_that_is_not_there_is_one_line_and_exit_code_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path, {"t\n": data([1])}, {})
    assert run_here(["show", str(tmp_path), "t\n", "--id", "2"]) == 1
    out, err = capfd.readouterr()
    assert (out, err) == ("", f"asyncloader: {tmp_path}: table t\\n has no id 2\n")
    assert run_here(["show", str(tmp_path), "t\n", "--id", "2", "--json"]) == 1
    out, err = capfd.readouterr()
    assert (json.loads(out)["found"], err) == (0, "")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["item_em"], "nothing in it is called 'item_em' (did you mean 'item_emb'?)"),
        (["item_emb@embeddin"], "(did you mean 'item_emb@embedding'?)"),
        (["one", "--id", "3"], "'one' is a dense tensor, it has no ids"),
        (["zzz\n"], "nothing in it is called 'zzz\\n'"),
    ],
)
def test_a_name_that_is_not_there_is_one_line_and_exit_code_2(
    arguments: list[str], says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run_here(["show", str(GENUINE / "small_4shards"), *arguments]) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert says in err


def test_the_command_prints_what_was_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    path = str(GENUINE / "optim_slots")
    for arguments, says in (
        (["user_emb"], "2,884 ids, 4 slots"),
        (["user_emb@step_filter"], "int64"),
        (["sparse_adamw_beta1"], "scalar"),
    ):
        assert run_here(["show", path, *arguments]) == 0
        assert says in capfd.readouterr().out
    id_ = int(read_checkpoint(GENUINE / "optim_slots")[0]["user_emb"].ids[0])
    assert run_here(["show", path, "user_emb", "--id", str(id_)]) == 0
    assert "step_filter" in capfd.readouterr().out


def test_ids_that_are_no_int64_are_refused(tmp_path: Path) -> None:
    """Comparing bytes with an id would find it where it is not."""
    blocks = [
        sparse_block("t", "id", torch.tensor([1, 2], dtype=torch.uint8)),
        sparse_block("t", "embedding", torch.ones(2, 1)),
    ]
    write_ranks(tmp_path, [blocks])
    assert run_here(["show", str(tmp_path), "t", "--id", "257"]) == 2
