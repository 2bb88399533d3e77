"""What people would use instead, each as it is used best on a machine without a GPU.

A peer yields names and tensors, which the case copies to where they belong or keeps; only
torch.distributed.checkpoint fills tensors itself. Peers read the checkpoint's own shards where they
can, others the same tensors in a format of theirs, split over as many files. Settings were chosen
by trying them on two cores with a warm page cache; where no reason is given, the default was best.
All peers are imported where they are used: who is not installed is left out.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from bench._raw import tensor_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor

    Items = Iterator[tuple[str, Tensor]]
    Read = Callable[[Sequence[Path], bool], Items]
    Fill = Callable[[Sequence[Path], Mapping[str, Tensor]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A loader of somebody else's."""

    name: str
    module: str
    suffix: str
    """Of the files that it reads."""

    read: Read | None = None
    """Yields the tensors of files; the flag says whether they will be kept."""

    fill: Fill
    """Fills tensors in place."""

    takes: float
    """Share of what it fills that it reads into memory of its own first, at a time."""

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.module) is not None


@contextmanager
def settings(**values: str) -> Iterator[None]:
    """Set environment variables, which is how some peers are told what to do."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def load_file(files: Sequence[Path], _: bool) -> Items:
    """Map each file whole."""
    from safetensors.torch import load_file  # noqa: PLC0415

    for file in files:
        for key, tensor in load_file(file).items():
            yield tensor_name(key), tensor


def safe_open(files: Sequence[Path], _: bool) -> Items:
    """Take tensors out of a file one by one."""
    from safetensors import safe_open  # noqa: PLC0415

    for file in files:
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # it is no dict
                yield tensor_name(key), opened.get_tensor(key)


def runai(files: Sequence[Path], keep: bool) -> Items:
    """Stream all files at once.

    Four threads were better than the default's eight. Tensors that are copied at once need no
    buffers of their own, and 256 MiB of buffers that are used again were faster than as many bytes
    of fresh ones as there are in the files.
    """
    from runai_model_streamer import SafetensorsStreamer  # noqa: PLC0415

    chosen = {"RUNAI_STREAMER_CONCURRENCY": "4"}
    if not keep:
        chosen["RUNAI_STREAMER_MEMORY_LIMIT"] = str(256 << 20)
    with settings(**chosen), SafetensorsStreamer() as streamer:
        streamer.stream_files([str(file) for file in files], device="cpu", owned=keep)
        for key, tensor in streamer.get_tensors():
            yield tensor_name(key), tensor


def fastsafetensors(files: Sequence[Path], keep: bool) -> Items:
    """Copy all files to memory, and yield views of it.

    Buffered reads: by default it reads past the page cache, at a third of the speed when that is
    warm. Two threads for two cores.
    """
    from fastsafetensors import SafeTensorsFileLoader  # noqa: PLC0415

    with settings(FASTSAFETENSORS_ODIRECT="0"):
        loader = SafeTensorsFileLoader(None, "cpu", nogds=True, max_threads=2)
        loader.add_filenames({0: [str(file) for file in files]})
        buffers = loader.copy_files_to_device(borrowed_tensors=not keep)
        for key, tensor in buffers.iter_local_tensors(loader.get_keys()):
            yield tensor_name(key), tensor
        buffers.close()
        loader.close()


def torch_load(files: Sequence[Path], _: bool) -> Items:
    """Unpickle each file."""
    for file in files:
        yield from torch.load(file, weights_only=True).items()


def torch_mmap(files: Sequence[Path], _: bool) -> Items:
    """Unpickle each file over a mapping of it."""
    for file in files:
        yield from torch.load(file, mmap=True, weights_only=True).items()


def tensorizer(files: Sequence[Path], _: bool) -> Items:
    """Read each file with one thread, when its tensors are asked for.

    Eight readers a file, the default, took three times as long, and so did one large file.
    """
    from tensorizer import TensorDeserializer  # noqa: PLC0415

    for file in files:
        with TensorDeserializer(file, device="cpu", lazy_load=True, num_readers=1) as opened:
            for _module, _kind, name, tensor in opened.read_tensors():
                yield name, tensor.detach()


def fill_distributed(files: Sequence[Path], tensors: Mapping[str, Tensor]) -> None:
    """Load in place, in one process; it cannot return tensors without being told their shapes."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader  # noqa: PLC0415  # slow
    from torch.distributed.checkpoint.state_dict_loader import load  # noqa: PLC0415

    load(dict(tensors), storage_reader=FileSystemReader(files[0].parent), no_dist=True)


def _copying(read: Read) -> Fill:
    def fill(files: Sequence[Path], tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in read(files, False):
            tensors[name].copy_(tensor)

    return fill


def _peer(name: str, module: str, suffix: str, read: Read, takes: float) -> Peer:
    return Peer(
        name=name, module=module, suffix=suffix, read=read, fill=_copying(read), takes=takes
    )


PEERS = (
    _peer("safetensors load_file", "safetensors", "safetensors", load_file, 0),
    _peer("safetensors safe_open", "safetensors", "safetensors", safe_open, 0),
    _peer("torch.load", "torch", "pt", torch_load, 1 / 16),
    _peer("torch.load mmap", "torch", "pt", torch_mmap, 0),
    Peer(name="torch DCP", module="torch", suffix="distcp", fill=fill_distributed, takes=1 / 16),
    _peer("runai-model-streamer", "runai_model_streamer", "safetensors", runai, 1 / 8),
    _peer("fastsafetensors", "fastsafetensors", "safetensors", fastsafetensors, 1),
    _peer("tensorizer", "tensorizer", "tensors", tensorizer, 1 / 16),
)
NAMES = tuple(one.name for one in PEERS)
