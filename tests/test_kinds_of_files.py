"""What is no safetensors file is called by its name, whatever reads it."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import pickle
import tarfile
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from asyncloader import CheckpointError, TruncatedShardError, load_tensors
from asyncloader._checkpoint.format import MAX_HEADER
from asyncloader.cli import run
from tests.support import nothing_left_behind

if TYPE_CHECKING:
    from pathlib import Path


def _saved(*, zipped: bool) -> bytes:
    stream = io.BytesIO()
    torch.save({"w": torch.ones(2)}, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


def _tarred() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("model.safetensors"))
    return stream.getvalue()


def _npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.ones(2))
    return stream.getvalue()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"
KINDS = {
    "a Git LFS pointer": (POINTER, "Git LFS pointer.*git lfs pull"),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
    "a web page that begins with a line break": (b"\n  <HTML><body>404</body></HTML>", "HTML page"),
    "a store's error": (b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", "XML text"),
    "a pickle": (pickle.dumps({"w": [1, 2]}), "pickle.*torch.load"),
    "torch.save": (_saved(zipped=True), "ZIP archive.*torch.load"),
    "torch.save of old": (_saved(zipped=False), "pickle.*torch.load"),
    "GGUF": (b"GGUF\3\0\0\0" + bytes(200), "GGUF"),
    "gzip": (gzip.compress(b"x" * 99), "gzip"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(20), "zstd"),
    "xz": (lzma.compress(b"x" * 99), "xz"),
    "bzip2": (bz2.compress(b"x" * 99), "bzip2"),
    "tar": (_tarred(), "tar archive"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    "a NumPy array": (_npy(), "NumPy"),
    "an index of JSON": (b'{"weight_map": {"w": "model.safetensors"}}', "JSON text"),
    "an index of two bytes": (b"{}", "JSON text"),
    "zeros": (bytes(4096), "zeros.*copy"),
}


@pytest.mark.parametrize(("content", "words"), KINDS.values(), ids=KINDS)
def test_a_file_of_another_kind_is_called_by_its_name(
    tmp_path: Path, content: bytes, words: str
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    for what in (path, tmp_path):
        with nothing_left_behind(), pytest.raises(CheckpointError, match=words) as caught:
            load_tensors(what)
        assert "is not a safetensors file but" in str(caught.value)
        assert caught.value.shard == path.name


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_commands_call_it_by_its_name_too(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(POINTER)
    assert run([command, str(path)]) == 2
    said = capsys.readouterr()
    assert "Git LFS pointer" in " ".join((said.out + said.err).split())


def test_an_empty_file_is_called_empty(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(TruncatedShardError, match="it is empty"):
        load_tensors(path)


def test_a_header_that_is_too_long_is_not_taken_for_another_kind_of_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((MAX_HEADER + 1).to_bytes(8, "little") + b'{"w":')
    with path.open("r+b") as file:
        file.truncate(2 * MAX_HEADER)
    with pytest.raises(CheckpointError, match=r"its header is 100,000,001 bytes long.*100,000,000"):
        load_tensors(path)


def test_a_file_of_which_nothing_is_known_is_still_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\xfe" * 99)
    with pytest.raises(CheckpointError, match="this is not a safetensors file"):
        load_tensors(path)
    save_file({"w": torch.ones(2)}, path)
    path.write_bytes(path.read_bytes().replace(b"{", b"(", 1))
    with pytest.raises(CheckpointError, match="does not start with a safetensors header"):
        load_tensors(path)


@pytest.mark.parametrize("name", ["model.bin", "model.gguf", "model.pt", "index"])
def test_a_file_of_torch_needs_no_name_of_its_own(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(_saved(zipped=True))
    assert load_tensors(path)


@pytest.mark.parametrize("name", ["model.bin", "model.gguf", "model.pt", "index"])
def test_a_file_of_another_name_is_called_by_what_it_is(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(_saved(zipped=False))
    with pytest.raises(CheckpointError, match=r"a pickle.*torch\.load"):
        load_tensors(path)


def test_a_safetensors_file_needs_no_name_of_its_own(tmp_path: Path) -> None:
    """As the blobs of Hugging Face's cache, which are called by their digest."""
    path = tmp_path / "0123abcd"
    save_file({"w": torch.ones(2)}, path)
    assert torch.equal(load_tensors(path)["w"], torch.ones(2))
