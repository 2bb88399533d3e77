"""URLs: what they name, and where they are refused, as the file system would make folders."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest
import torch

from asyncloader import CheckpointReader, Live, Loader, Saver, latest, load_tensors
from asyncloader._addresses import address_of
from asyncloader.cli import run

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

TAKERS: dict[str, Callable[[str | os.PathLike[str]], object]] = {
    "Loader": Loader,
    "CheckpointReader": CheckpointReader,
    "load_tensors": load_tensors,
    "Live": lambda path: Live(path, lambda: ({}, {})),
    "latest": latest,
    "Saver": lambda path: Saver(path=path, tensors={"w": torch.ones(1)}),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("hf://a/b", "of an unknown kind, hf://; known are s3://, "),
        ("s3:///model", "names no bucket: write s3://bucket/"),
        ("https://user:secret@host/m", "a query, a fragment or a password"),
        ("https://host/m?signature=secret", "a query, a fragment or a password"),
        ("s3://bucket/a/../b", "keys of objects have no parents"),
        ("s3:/bucket/a", "whose second slash is gone"),
        ("file://server/m", "names no local file"),
        (Path("s3://bucket/model"), "give it as text"),
    ],
)
def test_a_url_that_names_no_object_is_refused_at_once(
    taker: str, url: str | Path, words: str
) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        TAKERS[taker](url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "store", "root", "key", "account"),
    [
        ("s3://models", "S3", "models", "", ""),
        ("s3://models/ctr/ckpt_1/", "S3", "models", "ctr/ckpt_1", ""),
        ("S3://models//ctr", "S3", "models", "ctr", ""),
        ("gs://b/a b%20c", "Google Cloud Storage", "b", "a b%20c", ""),
        ("az://box/m", "Azure", "box", "m", ""),
        ("abfss://box@acc.dfs.core.windows.net/m", "Azure", "box", "m", "acc"),
        ("https://host:8080/a%20b/c", "HTTP", "https://host:8080", "a b/c", ""),
    ],
)
def test_the_parts_of_a_url(url: str, store: str, root: str, key: str, account: str) -> None:
    found = address_of(url, "path")
    assert (found.store, found.root, found.key, found.account) == (store, root, key, account)


def test_a_file_url_is_a_path(tmp_path: Path) -> None:
    path = tmp_path / "a b"
    Saver(path=path, tensors={"w": torch.ones(1)}).save()
    assert load_tensors(f"file://{quote(str(path))}")["w"].tolist() == [1.0]


def test_without_the_extra_the_error_says_what_to_install() -> None:
    code = "import sys; sys.modules['obstore'] = None; from asyncloader.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "inspect", "s3://bucket/model"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    line = "s3://bucket/model: lies in an object store, for which pip install 'asyncloader[cloud]'"
    assert done.stderr == f"asyncloader: {line}\n"


def test_without_the_extra_runs_and_saves_say_so_too() -> None:
    code = """if True:
        import sys; sys.modules["obstore"] = None
        import torch
        from asyncloader import CheckpointError, Saver, latest
        saver = Saver.to("s3://bucket/model", {}, {"w": torch.ones(1)})
        for call in (saver.save, lambda: latest("s3://bucket/run")):
            try:
                call()
            except CheckpointError as error:
                assert "pip install 'asyncloader[cloud]'" in str(error), error
            else:
                raise AssertionError
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_options_of_a_store_are_in_no_repr() -> None:
    loader = Loader("s3://bucket/m", storage_options={"secret_access_key": "secret"})
    assert "secret" not in repr(loader) + repr(loader.options)
    with pytest.raises(TypeError, match="storage_options is a dict"):
        Loader("s3://bucket/m", storage_options="secret")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="storage_options is a dict"):
        latest("s3://bucket/m", storage_options="secret")  # type: ignore[call-overload]
    saver = Saver(path="s3://bucket/m", storage_options={"secret_access_key": "secret"})
    assert "secret" not in repr(saver)
    with pytest.raises(TypeError, match="storage_options is a dict"):
        Saver(path="s3://bucket/m", storage_options="secret")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "BAD"],
        ["show", "BAD", "w"],
        ["load", "BAD"],
        ["verify", "BAD"],
        ["diff", "HERE", "BAD"],
        ["diff", "BAD", "HERE"],
        ["convert", "BAD", "HERE.safetensors"],
        ["convert", "HERE", "BAD"],
        ["convert", "HERE", "READ_ONLY"],
    ],
)
def test_no_command_takes_one_that_names_nothing_or_cannot_be_written_to(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "here"
    Saver(path=here, tensors={"w": torch.ones(1)}).save()
    before = sorted(tmp_path.rglob("*"))

    names = {"BAD": "hf://a/b", "READ_ONLY": "https://host/new", "HERE": str(here)}
    for name, path in names.items():
        command = [part.replace(name, path) for part in command]
    code = run(command)

    assert code == 2
    assert re.search("is a URL|is read only", capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_local_folder_whose_name_looks_like_one_has_an_absolute_path(tmp_path: Path) -> None:
    path = tmp_path / "s3:" / "bucket"
    Saver(path=path, tensors={"w": torch.ones(1)}).save()

    assert load_tensors(path)["w"].tolist() == [1.0]


@pytest.mark.parametrize("end", [".safetensors", ".pt", ".pth", ".bin/"])
def test_no_save_goes_where_a_load_would_look_for_one_file(end: str) -> None:
    with pytest.raises(ValueError, match="would be read as one file, by the end of its name"):
        Saver(path=f"s3://bucket/model{end}")


@pytest.mark.parametrize(("scheme", "option"), [("s3", "endpoint"), ("gs", "base_url")])
def test_an_endpoint_that_is_no_url_is_refused(scheme: str, option: str) -> None:
    with pytest.raises(ValueError, match=rf"{option}='127\.0\.0\.1:1' is no URL"):
        latest(f"{scheme}://bucket/run", storage_options={option: "127.0.0.1:1"})


def test_a_url_without_its_colon_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "s3//models/ctr"]) == 2
    assert "of a URL, a colon is missing: s3://" in capsys.readouterr().err
