"""Checkpoints read from S3: OpenStack Swift, a real server, on loopback."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast
from urllib.request import Request, urlopen

import obstore
import pytest
import torch
from obstore.store import S3Store

from asyncloader import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointReader,
    Loader,
    ReadOptions,
    load_tensors,
    read_extra,
    read_io_state,
)
from asyncloader.cli import run
from asyncloader.tools import convert, diff, inspect, verify
from tests.genuine import NEWEST, RUN, truth
from tests.servers.processes import UnavailableError
from tests.servers.swift import swift
from tests.support import rows_in, rows_on_disk

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

URL = f"s3://models/ctr/{NEWEST}"


@pytest.fixture(scope="module")
def s3() -> Iterator[dict[str, Any]]:
    """Return the options of a store whose bucket `models` holds the genuine run, as `ctr`."""
    try:
        with swift() as server:
            options = server.options
            store = bucket(options, "models")
            for path in RUN.rglob("*"):
                if path.is_file():
                    obstore.put(store, f"ctr/{path.relative_to(RUN)}", path.read_bytes())
            yield options
    except UnavailableError as error:
        pytest.skip(str(error))


def bucket(options: dict[str, Any], name: str) -> S3Store:
    """Make a bucket, and return its client."""
    store = S3Store(name, config=cast("Any", options), client_options={"allow_http": True})
    url = obstore.sign(store, "PUT", "", timedelta(minutes=1))
    with urlopen(Request(url, method="PUT")) as answer:  # noqa: S310  # ours
        assert answer.status == 200
    return store


def test_a_genuine_checkpoint_comes_whole(s3: dict[str, Any]) -> None:
    held = truth(NEWEST)
    tables, tensors = held.destinations()
    report = Loader(URL, tables, tensors, strict=True, storage_options=s3).load()
    assert (report.location, report.missing) == (URL, ())
    for name, table in tables.items():
        assert rows_in(table) == rows_on_disk(held.tables[name])
    for name, tensor in tensors.items():
        assert torch.equal(tensor, held.tensors[name])


def test_every_other_door_reads_it_too(s3: dict[str, Any], tmp_path: Path) -> None:
    held, options = truth(NEWEST), ReadOptions(storage_options=s3)
    for name, tensor in load_tensors(URL, options=options).items():
        assert torch.equal(tensor, held.tensors[name])
    assert len(CheckpointReader(URL, options=options).read_tensor("user@id")) == 111
    assert int(read_extra(URL, options=options)["global_step"]) == 30
    assert "train_io" in read_io_state(URL, 0, options=options)
    found = inspect(URL, options=options)
    assert found.location == URL
    assert found.beside.global_step == 30  # type: ignore[union-attr]
    assert verify(URL, options=options).problems == ()
    assert diff(URL, RUN / NEWEST, options=options).equal
    convert(URL, tmp_path / "here", options=options)
    assert diff(URL, tmp_path / "here", options=options).equal


@pytest.mark.parametrize(
    ("url", "more", "error", "words"),
    [
        ("s3://models/ctr/ckpt_99", {}, CheckpointNotFoundError, "no such object; looked for"),
        ("s3://no-such-bucket/ctr", {}, CheckpointNotFoundError, "no such object; looked for"),
        (URL, {"secret_access_key": "wrong"}, CheckpointError, "refused; do the credentials"),
        (URL, {"access_key_id": "nobody"}, CheckpointError, "refused; do the credentials"),
        (URL, {"acces_key": "x"}, ValueError, "'acces_key' is not valid for store 'S3'"),
    ],
)
def test_what_cannot_be_read_is_one_clear_line(
    s3: dict[str, Any], url: str, more: dict[str, str], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words) as caught:
        Loader(url, storage_options=s3 | more).load()
    assert url in str(caught.value)
    assert "Signature" not in str(caught.value)
    assert str(s3["secret_access_key"]) not in str(caught.value)


def test_keys_are_any_text_and_a_folder_is_listed(s3: dict[str, Any]) -> None:
    store = S3Store("models", config=cast("Any", s3), client_options={"allow_http": True})
    from_here = (RUN / NEWEST / "model-000001-of-000004.safetensors").read_bytes()
    obstore.put(store, "odd/a b%20ü+/model.fp16.safetensors", from_here)
    assert load_tensors("s3://models/odd/a b%20ü+", storage_options=s3)


def test_the_command_line_takes_the_environment(
    s3: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("endpoint", "access_key_id", "secret_access_key", "region"):
        monkeypatch.setenv(f"AWS_{name.upper()}", str(s3[name]))
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    for command in ("inspect", "verify", "load"):
        assert run([command, URL, "--json"]) == 0, capsys.readouterr().err
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    assert run(["load", URL]) == 2
    assert "refused" in capsys.readouterr().err
    assert os.environ["AWS_REGION"]
