"""`asyncloader bank`: from which checkpoint each part of a model comes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch

from asyncloader.cli import run
from tests.oracle import write_checkpoint
from tests.support import data

if TYPE_CHECKING:
    from pathlib import Path

CONTENT = data([1, 2], m=1)


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "a", {"t": CONTENT, "u": CONTENT}, {"w": torch.ones(1)})
    write_checkpoint(tmp_path / "b", {"t": CONTENT, "v": CONTENT}, {})
    entries = [
        str(tmp_path / "a"),
        {"path": str(tmp_path / "b"), "load": ["t", "u"], "oname": {"u": "v"}},
    ]
    file = tmp_path / "bank.json"
    file.write_text(json.dumps(entries))
    return file


def test_it_shows_where_each_name_comes_from(
    bank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["bank", str(bank)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["t@*", "(3)", "1"] in lines
    assert ["u@*", "(3)", "1", "v@*"] in lines
    assert ["v@*", "(3)", "0"] not in lines
    assert ["w", "0"] in lines


def test_the_model_may_be_that_of_a_checkpoint(
    bank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    like = str(bank.parent / "a")
    assert run(["bank", str(bank), "--like", like, "--resume", str(bank.parent), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    slots = {f"{table}@{slot}" for table in "tu" for slot in ("id", "embedding", "m")}
    assert set(found["origins"]) == {"w"} | slots
    assert found["origins"]["u@m"] == {"entry": 1, "path": f"{bank.parent}/b", "name": "v@m"}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[", "not JSON"),
        ('[{"path": "PATH/a", "lod": []}]', "there is no field 'lod'"),
        ('[{"path": "PATH/a", "load": ["x"]}]', "the model has no 'x'"),
        ('{"path": "PATH/a"}', "a bank is a list"),
    ],
)
def test_what_is_wrong_with_it_is_said(
    bank: Path, capsys: pytest.CaptureFixture[str], text: str, complaint: str
) -> None:
    bank.write_text(text.replace("PATH", str(bank.parent)))
    assert run(["bank", str(bank)]) == 2
    assert complaint in capsys.readouterr().err
