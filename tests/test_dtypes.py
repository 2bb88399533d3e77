"""One tensor of a dtype that is not known keeps no other one from being read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file

from asyncloader import CheckpointError, CheckpointReader, Loader, PlanError, load_tensors
from asyncloader.cli import run
from tests.checkpoints import flip
from tests.support import raw

if TYPE_CHECKING:
    from pathlib import Path

W = torch.arange(4.0)
UNKNOWN = {
    "a name of the future": ("I128", [2], 32),
    "six bits": ("F6_E2M3", [4], 3),
    "half a byte, where torch takes two": ("F4", [2, 3], 3),
}
NEWER = {
    name: getattr(torch, name)
    for name in ("float8_e8m0fnu", "float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2")
    if hasattr(torch, name)
}


def written(path: Path, dtype: str, shape: list[int], nbytes: int, *, last: bytes = b"") -> Path:
    """Write a file of `w` and of one tensor `odd`, whose bytes count up, but for the last."""
    header = {
        "odd": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]},
        "w": {"dtype": "F32", "shape": [4], "data_offsets": [nbytes, nbytes + 16]},
    }
    text = json.dumps(header).encode()
    odd = bytes(number % 256 for number in range(1, nbytes + 1))
    path.write_bytes(len(text).to_bytes(8, "little") + text + odd + W.numpy().tobytes())
    return path


def blocks(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Return dtype, shape and bytes of what a file holds."""
    content = path.read_bytes()
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = (entry["dtype"], entry["shape"], content[data + begin : data + end])
    return found


@pytest.mark.parametrize(("dtype", "shape", "nbytes"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_asked_for_is_read_beside_an_unknown_dtype(
    tmp_path: Path, dtype: str, shape: list[int], nbytes: int
) -> None:
    path = written(tmp_path / "x.safetensors", dtype, shape, nbytes)
    found = torch.zeros(4)
    Loader(path, tensors={"w": found}).load()
    assert torch.equal(found, W)
    assert torch.equal(load_tensors(path, ["w"])["w"], W)
    with CheckpointReader(path) as reader:
        assert reader.tensor_shape("odd") == tuple(shape)
        with pytest.raises(CheckpointError, match=f"'odd'.* is {dtype}.*ask for other tensors"):
            reader.read_tensor("odd")
    with pytest.raises(CheckpointError, match=f"is {dtype}, which torch"):
        load_tensors(path)
    with pytest.raises(PlanError, match=f"'odd'.*{dtype}"):
        Loader(path, tensors={"odd": torch.zeros(shape)}).load()


@pytest.mark.parametrize(("dtype", "shape", "nbytes"), UNKNOWN.values(), ids=UNKNOWN)
def test_an_unknown_dtype_is_listed_by_name_and_size(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    shape: list[int],
    nbytes: int,
) -> None:
    path = written(tmp_path / "x.safetensors", dtype, shape, nbytes)
    assert run(["inspect", str(path), "--json"]) == 0
    odd, w = json.loads(capsys.readouterr().out)["tensors"]
    assert odd == {"name": "odd", "dtype": dtype, "shape": shape, "bytes": nbytes}
    assert (w["dtype"], w["bytes"]) == ("float32", 16)
    assert run(["verify", str(path), "--json"]) == 0
    assert f"is {dtype}, which torch does not have" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("odd", "rows"),
    [
        (
            ("I128", [2], 32),
            [["0x100f0e0d0c0b0a090807060504030201"], ["0x201f1e1d1c1b1a191817161514131211"]],
        ),
        (("X7", [2, 2], 4), [["0x01", "0x02"], ["0x03", "0x04"]]),
        (("F4", [2, 4], 4), [["0x01", "0x02"], ["0x03", "0x04"]]),
        (("X7", [], 2), [["0x0201"]]),
        (("F6_E2M3", [4], 3), []),
        (("X7", [4], 3), []),
        (("X7", [0], 3), []),
        (("X7", [4], 0), []),
    ],
)
def test_what_has_no_numbers_is_shown_as_bits(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    odd: tuple[str, list[int], int],
    rows: list[list[str]],
) -> None:
    path = written(tmp_path / "x.safetensors", *odd)
    assert run(["show", str(path), "odd", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["values"] for row in found["rows"]] == rows
    assert (found["statistics"], found["bytes"]) == (None, odd[2])
    assert run(["show", str(path), "odd"]) == 0
    out = capsys.readouterr().out
    assert all(text in out for row in rows for text in row)


@pytest.mark.parametrize(
    "odd", [*UNKNOWN.values(), ("F4", [2, 4], 4), ("X7", [2, 5], 7), ("X7", [1], 1000)]
)
def test_what_has_no_numbers_is_compared_bit_for_bit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], odd: tuple[str, list[int], int]
) -> None:
    a = written(tmp_path / "a.safetensors", *odd)
    b = written(tmp_path / "b.safetensors", *odd)
    assert run(["diff", str(a), str(b)]) == 0
    flip(b, -17)  # the last byte before `w`
    capsys.readouterr()
    assert run(["diff", str(a), str(b)]) == 1
    assert "no numbers" in capsys.readouterr().out
    assert run(["diff", str(a), str(b), "--json"]) == 1
    found, w = json.loads(capsys.readouterr().out)["tensors"]
    assert found["change"] == {"different": 1, "largest": None, "infinite": 0, "nans": 0}
    assert w["change"]["different"] == 0


@pytest.mark.parametrize("sizes", [(8, 7), (0, 8), (4, 8)])
def test_one_unknown_dtype_may_take_other_bytes_for_the_same_shape(
    tmp_path: Path, sizes: tuple[int, int]
) -> None:
    a, b = (written(tmp_path / f"{n}.safetensors", "X7", [4], n) for n in sizes)
    assert run(["diff", str(a), str(b)]) == 1
    assert run(["diff", str(a), str(a)]) == 0


@pytest.mark.parametrize(("dtype", "shape", "nbytes"), UNKNOWN.values(), ids=UNKNOWN)
def test_load_leaves_out_what_torch_cannot_hold_and_names_it(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    shape: list[int],
    nbytes: int,
) -> None:
    path = written(tmp_path / "x.safetensors", dtype, shape, nbytes)
    assert run(["load", str(path), "--cast", "float64", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["report"]
    assert report["tensors"] == {"w": "copied"}
    assert report["warnings"] == [f"'odd' is {dtype}, which torch lacks: left out"]
    assert run(["load", str(path)]) == 0
    assert "left out" in capsys.readouterr().out


@pytest.mark.parametrize(("dtype", "shape", "nbytes"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_folder_is_not_written_without_what_torch_cannot_hold(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    shape: list[int],
    nbytes: int,
) -> None:
    path = written(tmp_path / "x.safetensors", dtype, shape, nbytes)
    assert run(["convert", str(path), str(tmp_path / "to")]) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert f"'odd' ({dtype})" in err
    assert "that ends in .safetensors" in err
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("kind", ["a file", "a folder"])
@pytest.mark.parametrize(("dtype", "shape", "nbytes"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_plain_file_gets_the_bytes_of_an_unknown_dtype_beside_all_others(
    tmp_path: Path, dtype: str, shape: list[int], nbytes: int, kind: str
) -> None:
    path = written(tmp_path / "x.safetensors", dtype, shape, nbytes)
    source = path if kind == "a file" else tmp_path
    if kind == "a folder":
        save_file({"v": -W}, tmp_path / "v.safetensors")
        weight_map = {"odd": path.name, "v": "v.safetensors", "w": path.name}
        (tmp_path / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": weight_map})
        )
    to = tmp_path.parent / f"{tmp_path.name}.safetensors"
    assert run(["convert", str(source), str(to)]) == 0
    want = blocks(path) | (blocks(tmp_path / "v.safetensors") if kind == "a folder" else {})
    assert blocks(to) == want
    assert run(["verify", str(to)]) == 0


def test_neighbours_survive_whatever_stands_last(tmp_path: Path) -> None:
    header = {
        "new": {"dtype": "X7", "shape": [16], "data_offsets": [16, 24]},
        "w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        "none": {"dtype": "F6_E3M2", "shape": [0], "data_offsets": [24, 24]},
    }
    text = json.dumps(header).encode()
    path, to = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + W.numpy().tobytes() + b"\x11" * 8)
    assert run(["convert", str(path), str(to)]) == 0
    assert blocks(to) == blocks(path)


@pytest.mark.parametrize("dtype", NEWER.values(), ids=NEWER)
def test_dtypes_of_a_newer_torch_are_read_as_safetensors_reads_them(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    path = tmp_path / "x.safetensors"
    stored = torch.arange(6, dtype=torch.uint8).view(dtype).reshape(2, 3)
    save_file({"odd": stored, "w": W}, path)
    found = load_tensors(path)
    assert raw(found["odd"]) == raw(load_file(path)["odd"]) == raw(stored)
    here = torch.zeros((2, 3), dtype=torch.uint8).view(dtype)
    Loader(path, tensors={"odd": here}).load()
    assert raw(here) == raw(stored)


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes"),
    [
        ("F6_E2M3", [4], 4),
        ("F6_E2M3", [3], 2),
        ("F4", [3], 2),
        ("F4", [4], 1),
        ("I128", [2**62, 2], 8),
        ("bool", [4], 4),
        ("float32", [4], 16),
        ("I" * 33, [4], 4),
        ("I\x1b[", [4], 4),
    ],
)
def test_sizes_and_names_that_make_no_sense_are_refused(
    tmp_path: Path, dtype: str, shape: list[int], nbytes: int
) -> None:
    path = written(tmp_path / "x.safetensors", dtype, shape, nbytes)
    with pytest.raises(CheckpointError) as caught:
        load_tensors(path, ["w"])
    assert caught.value.key == "odd"
