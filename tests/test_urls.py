"""A URL is refused wherever a path is taken: the local file system would take it for a folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from asyncloader import CheckpointReader, Live, Loader, Saver, latest, load_tensors
from asyncloader.cli import run

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

URLS = ["s3://bucket/model", "gs://b/m", "https://user:secret@host/m", "file:///tmp/m", "hf://a/b"]
TAKERS: dict[str, Callable[[str | os.PathLike[str]], object]] = {
    "Loader": Loader,
    "Saver": lambda path: Saver(path=path, tensors={"w": torch.ones(1)}),
    "CheckpointReader": CheckpointReader,
    "load_tensors": load_tensors,
    "Live": lambda path: Live(path, lambda: ({}, {})),
    "latest": latest,
}


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("taker", TAKERS)
def test_a_url_is_no_path(taker: str, url: str) -> None:
    for given in (url, Path(url)):  # pathlib takes one of the slashes
        with pytest.raises(ValueError, match="is a URL") as caught:
            TAKERS[taker](given)
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [
        ["inspect", "URL"],
        ["show", "URL", "w"],
        ["load", "URL"],
        ["verify", "URL"],
        ["diff", "HERE", "URL"],
        ["diff", "URL", "HERE"],
        ["convert", "URL", "HERE.safetensors"],
        ["convert", "HERE", "URL"],
        ["convert", "HERE", "URL.safetensors"],
    ],
)
def test_no_command_takes_one(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    here = tmp_path / "here"
    Saver(path=here, tensors={"w": torch.ones(1)}).save()
    before = sorted(tmp_path.rglob("*"))

    code = run([part.replace("URL", URLS[0]).replace("HERE", str(here)) for part in command])

    assert code == 2
    assert "is a URL" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_local_folder_whose_name_looks_like_one_has_an_absolute_path(tmp_path: Path) -> None:
    path = tmp_path / "s3:" / "bucket"
    Saver(path=path, tensors={"w": torch.ones(1)}).save()

    assert load_tensors(path)["w"].tolist() == [1.0]
