"""Reading whole checkpoints without being told what is in them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from asyncloader import CheckpointError, aload_tensors, load_tensors
from asyncloader._checkpoint.blocks import Block
from asyncloader._checkpoint.dtypes import DType
from asyncloader._checkpoint.manifest import Stored
from asyncloader._loading.reading import torch_dtype
from tests.oracle import DTYPES, append, edit_header, flat_bytes, shard_holding, write_checkpoint
from tests.steps import Steps
from tests.support import data, debug_off, nothing_left_behind, raw

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

CONTENT = data([1, 2, -1, 2**40, 9], m=1)
DENSE = {
    "w": torch.arange(6.0).view(2, 3),
    "b": torch.tensor(3),
    "none": torch.zeros(3, 0),
    "layers.10.weight": torch.ones(2, 2),
    "t@id (part 0)": torch.ones(1),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(path, {"t": CONTENT}, DENSE, ranks=3, sort=True)
    return path


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return {name: raw(tensor) for name, tensor in found.items()} == {
        name: raw(tensor) for name, tensor in expected.items()
    }


async def test_without_names_all_dense_tensors_come(checkpoint: Path) -> None:
    with nothing_left_behind():
        found = await aload_tensors(checkpoint)
    assert same(found, DENSE)


async def test_the_blocking_call_works_where_a_loop_runs(checkpoint: Path) -> None:
    with nothing_left_behind():
        assert same(load_tensors(checkpoint), DENSE)


@pytest.mark.parametrize("names", [["b", "w"], ["w", "b", "w"], [], ["t@m", "w", "t@id"]])
def test_what_is_named_comes_in_the_order_of_names(checkpoint: Path, names: list[str]) -> None:
    assert list(load_tensors(checkpoint, iter(names))) == list(dict.fromkeys(names))


def test_tables_come_if_they_are_named(checkpoint: Path) -> None:
    names = ["t@id", "t@embedding", "t@m", "t@id (part 0)"]

    found = load_tensors(checkpoint, names)

    order = torch.argsort(found["t@id"])
    expected = torch.argsort(CONTENT.ids)
    assert torch.equal(found["t@id"][order], CONTENT.ids[expected])
    for slot, rows in CONTENT.slots.items():
        assert torch.equal(found[f"t@{slot}"][order], rows[expected])
    assert same({"x": found["t@id (part 0)"]}, {"x": DENSE["t@id (part 0)"]})


@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 4), max_size=4)),
        max_size=6,
    ),
    st.integers(1, 4),
)
def test_every_dtype_and_shape_comes_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory,
    tensors: dict[str, tuple[torch.dtype, Sequence[int]]],
    parallel: int,
) -> None:
    made = {name: noise(dtype, shape) for name, (dtype, shape) in tensors.items()}
    path = tmp_path_factory.mktemp("any")
    write_checkpoint(path, {}, made)
    assert same(load_tensors(path, parallel=parallel), made)


def noise(dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    tensor = torch.empty(tuple(shape), dtype=dtype)
    flat = flat_bytes(tensor)
    flat.copy_(torch.randint(0, 2 if dtype == torch.bool else 256, flat.shape, dtype=torch.uint8))
    return tensor


def test_it_reads_what_safetensors_reads(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({f"w{n}": torch.randn(n, 3) for n in range(20)}, file, metadata={"format": "pt"})
    assert same(load_tensors(file), load_file(file))


def test_large_tensors_come_whole(tmp_path: Path) -> None:
    """Those of more than 2 MiB lie in memory of another kind."""
    made = {f"w{n}": torch.randn(700_000 + n) for n in range(3)}
    write_checkpoint(tmp_path, {}, made)
    assert same(load_tensors(tmp_path), made)


async def test_what_comes_is_the_callers_own(checkpoint: Path) -> None:
    with torch.inference_mode():
        one = await aload_tensors(checkpoint, ["w", "t@embedding"])
    other = await aload_tensors(checkpoint, ["w", "t@embedding"])
    for tensor in one.values():
        assert not tensor.is_inference()
        torch.autograd.backward(tensor.requires_grad_().sum())
        with torch.no_grad():
            tensor.fill_(-1)
    assert torch.equal(other["w"], DENSE["w"])


def test_all_unknown_names_are_in_one_error(checkpoint: Path) -> None:
    names = ["w", "v", "layers.1.weight", "t", "t@M", "other@id", ""]
    with pytest.raises(KeyError) as caught:
        load_tensors(checkpoint, names)
    text = str(caught.value)
    assert str(checkpoint) in text
    assert "'layers.1.weight' (did you mean 'layers.10.weight'?)" in text
    assert "'t' (a table: read 't@embedding', 't@id', 't@m')" in text
    assert "'t@M' (did you mean 't@m'?)" in text
    assert "'other@id'" in text
    assert "'w'" not in text


def test_of_many_unknown_names_some_are_shown(checkpoint: Path) -> None:
    with pytest.raises(KeyError, match="'x19' and 9,980 more"):
        load_tensors(checkpoint, [f"x{n}" for n in range(10_000)])


def test_a_name_is_guessed_among_any_number(tmp_path: Path) -> None:
    names = [f"layers.{n}.{what}" for n in range(300) for what in ("weight", "bias")]
    save_file({name: torch.ones(1) for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(KeyError, match=r"did you mean 'layers\.277\.weight'"):
        load_tensors(tmp_path / "x.safetensors", ["layers.277.wieght"])


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"names": "w"}, TypeError),
        ({"names": 3}, TypeError),
        ({"names": [3]}, TypeError),
        ({"names": ["w", None]}, TypeError),
        ({"parallel": 0}, ValueError),
        ({"parallel": "2"}, TypeError),
        ({"direct_io": "no"}, TypeError),
        ({"checkpoint_path": None}, TypeError),
        ({"checkpoint_path": b"x"}, TypeError),
        ({"checkpoint_path": "a\0b"}, ValueError),
    ],
)
async def test_arguments_that_make_no_sense_are_refused(
    checkpoint: Path, arguments: dict[str, object], kind: type[Exception]
) -> None:
    with nothing_left_behind(), pytest.raises(kind):
        await aload_tensors(**{"checkpoint_path": checkpoint, **arguments})  # type: ignore[arg-type]  # the very thing


def test_a_file_that_has_no_digests_is_named_where_they_are_required(tmp_path: Path) -> None:
    file = tmp_path / "d.safetensors"
    save_file({"w": torch.ones(3)}, file)
    with pytest.raises(CheckpointError, match=r"d\.safetensors: has no digests"):
        load_tensors(file, verify="require")


def test_a_dtype_that_torch_lacks_is_named() -> None:
    """An older torch has no uint16, say, and would raise `AttributeError` for it."""
    dtype = DType("F4", "float4_e2m1", 1)
    block = Block("f.safetensors", "w", dtype, (2,), 8, 2)
    stored = Stored(name="w", dtype=dtype, shape=(2,), blocks=(block,))
    with pytest.raises(CheckpointError, match=r"'w'.* is F4, which torch does not have"):
        torch_dtype("here", stored)


async def test_a_shape_that_torch_cannot_have_is_an_error(tmp_path: Path) -> None:
    """It takes no byte, so its offsets are as they should be."""
    file = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(0)}, file)
    edit_header(file, lambda header: header["w"].update(shape=[0, 2**62, 8]))
    with nothing_left_behind(), pytest.raises(CheckpointError, match="64 bits") as caught:
        await aload_tensors(file)
    assert caught.value.key == "w"


def test_bytes_after_the_last_block_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_checkpoint(tmp_path, {}, {"w": torch.ones(1)})
    append(shard_holding(tmp_path, "w^ "), b"12345")
    assert same(load_tensors(tmp_path), {"w": torch.ones(1)})
    assert "5 bytes after the last block" in caplog.text


async def test_wherever_it_is_cancelled_nothing_is_left_behind(checkpoint: Path) -> None:
    names, step = ["w", "t@embedding", "t@m"], 0
    while True:
        with debug_off(), nothing_left_behind():
            steps = Steps(range(step, step + 1))
            if not await steps.run(partial(aload_tensors, checkpoint, names)):
                break
        step += 1
    assert step > 10, "there were awaits to cancel"
