"""What people would use instead to load tensors from S3, each as it is used best.

All of them take a server other than Amazon's from the environment, or as arguments. They read the
checkpoint's own shards, but for those with a format of their own.
"""

from __future__ import annotations

import contextlib
import importlib.util
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import obstore

from bench._peers import settings
from bench._raw import tensor_name

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor

    from tests.servers.swift import S3Server

    Fill = Callable[[S3Server, str, Sequence[str], Mapping[str, Tensor]], None]

TENSORS = "tensorizer/dense.tensors"
DCP = "dcp/dense"


def runai(server: S3Server, bucket: str, keys: Sequence[str], into: Mapping[str, Tensor]) -> None:
    """Stream all shards at once, 16 requests at a time, by its client in C++."""
    from runai_model_streamer import SafetensorsStreamer  # noqa: PLC0415

    with (
        settings(
            AWS_ENDPOINT_URL=server.endpoint,
            AWS_ACCESS_KEY_ID=server.access_key,
            AWS_SECRET_ACCESS_KEY=server.secret_key,
            AWS_REGION=server.region,
            RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING="0",
            RUNAI_STREAMER_CONCURRENCY="16",
        ),
        SafetensorsStreamer() as streamer,
    ):
        streamer.stream_files([f"s3://{bucket}/{key}" for key in keys], device="cpu")
        for key, tensor in streamer.get_tensors():
            into[tensor_name(key)].copy_(tensor)


def s3fs(server: S3Server, bucket: str, keys: Sequence[str], into: Mapping[str, Tensor]) -> None:
    """Fetch shards whole, four at a time, and have safetensors parse them."""
    import s3fs as fs  # noqa: PLC0415
    from safetensors.torch import load  # noqa: PLC0415

    system = fs.S3FileSystem(
        key=server.access_key,
        secret=server.secret_key,
        endpoint_url=server.endpoint,
        client_kwargs={"region_name": server.region},
        skip_instance_cache=True,
    )

    def fetch(key: str) -> None:
        for name, tensor in load(system.cat_file(f"{bucket}/{key}")).items():
            into[tensor_name(name)].copy_(tensor)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(fetch, keys))


def tensorizer(server: S3Server, bucket: str, _: Sequence[str], into: Mapping[str, Tensor]) -> None:
    """Stream its one file, with four readers."""
    from tensorizer import TensorDeserializer  # noqa: PLC0415
    from tensorizer.stream_io import open_stream  # noqa: PLC0415

    uri = f"s3://{bucket}/{TENSORS}"
    stream = open_stream(
        uri,
        mode="rb",
        s3_access_key_id=server.access_key,
        s3_secret_access_key=server.secret_key,
        s3_endpoint=server.endpoint,
        force_http=True,
    )
    with stream, TensorDeserializer(stream, device="cpu", num_readers=1) as reader:
        for name, tensor in reader.items():
            into[name].copy_(tensor)


def write_tensors(server: S3Server, bucket: str, tensors: Mapping[str, Tensor]) -> None:
    """Write tensorizer's file."""
    from tensorizer import TensorSerializer  # noqa: PLC0415

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dense.tensors"
        writer = TensorSerializer(str(path))
        writer.write_state_dict(dict(tensors))
        writer.close()
        obstore.put(server.store(bucket), TENSORS, path)


def dcp(server: S3Server, bucket: str, _: Sequence[str], into: Mapping[str, Tensor]) -> None:
    """Fill tensors in place, a file after the other, each by ranges of 16 MiB in parallel."""
    from s3torchconnector import S3ClientConfig  # noqa: PLC0415
    from s3torchconnector.dcp import S3StorageReader  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_loader import load  # noqa: PLC0415

    client = S3ClientConfig(force_path_style=True, part_size=16 << 20)
    with _reached(server):
        uri = f"s3://{bucket}/{DCP}"
        reader = S3StorageReader(server.region, uri, s3client_config=client)
        load(dict(into), storage_reader=reader, no_dist=True)


def write_dcp(server: S3Server, bucket: str, tensors: Mapping[str, Tensor]) -> None:
    """Write eight files, each uploaded as one part: Swift gives these out the fastest."""
    from s3torchconnector import S3ClientConfig  # noqa: PLC0415
    from s3torchconnector.dcp import S3StorageWriter  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415

    client = S3ClientConfig(force_path_style=True, part_size=256 << 20)
    with _reached(server):
        uri = f"s3://{bucket}/{DCP}"
        writer = S3StorageWriter(server.region, uri, s3client_config=client, thread_count=8)
        # Copies: those of the truth share memory, which torch would save once and whole.
        apart = {name: tensor.clone() for name, tensor in tensors.items()}
        save(apart, storage_writer=writer, no_dist=True)


@contextlib.contextmanager
def _reached(server: S3Server) -> Iterator[None]:
    """Tell of the server by the environment, as its client, in C, wants it; and be quiet."""
    with (
        settings(
            AWS_ENDPOINT_URL=server.endpoint,
            AWS_ACCESS_KEY_ID=server.access_key,
            AWS_SECRET_ACCESS_KEY=server.secret_key,
        ),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


PEERS: dict[str, tuple[str, Fill]] = {
    "runai-model-streamer": ("runai_model_streamer_s3", runai),
    "s3fs + safetensors": ("s3fs", s3fs),
    "s3torchconnector, DCP": ("s3torchconnector", dcp),
    "tensorizer": ("tensorizer", tensorizer),
}
# Those with a format of their own.
WRITE = {"s3torchconnector, DCP": write_dcp, "tensorizer": write_tensors}


def installed(module: str) -> bool:
    """Say whether a peer is there."""
    return importlib.util.find_spec(module) is not None
