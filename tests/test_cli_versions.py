"""`asyncloader versions`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from asyncloader.cli import run
from tests.genuine import NAMES, NEWEST, copy_of_run

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

    from tests.servers.places import Place

STRANGE = "model-000001-of-000008-5f0c.safetensors"


def test_finished_checkpoints_are_listed_a_line_for_each(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of_run(tmp_path)
    (folder / "half").mkdir()
    (folder / "half" / STRANGE).touch()
    next((folder / NAMES[0]).glob("*.safetensors")).unlink()
    assert run(["versions", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}/{NEWEST}\n"


def test_with_all_what_saves_have_left_is_listed_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of_run(tmp_path)
    (folder / "half").mkdir()
    (folder / "half" / STRANGE).touch()
    (folder / NEWEST / ".saving-2-x").mkdir()
    (folder / NEWEST / STRANGE).touch()
    assert run(["versions", str(folder), "--all"]) == 0
    out = capsys.readouterr().out
    assert "not committed" in out
    for left in (f"half/{STRANGE}", f"{NEWEST}/{STRANGE}", f"{NEWEST}/.saving-2-x/"):
        assert left in out
    assert "model-000000-of-000004" not in out  # its index names it
    (folder / NAMES[0] / "index").write_text("{")  # may name any of them
    assert run(["versions", str(folder), "--json"]) == 0
    found = {one["name"]: one["saving"] for one in json.loads(capsys.readouterr().out)["versions"]}
    assert found == {NAMES[0]: [], NEWEST: [".saving-2-x/", STRANGE], "half": [STRANGE]}


def test_what_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_of_run(tmp_path)
    assert run(["versions", str(folder / NEWEST)]) == 2
    assert "is a checkpoint itself" in capsys.readouterr().err
    assert run(["versions", str(tmp_path / "nowhere")]) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_those_in_a_bucket_are_urls(
    s3: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.options.items():
        where = "AWS_ENDPOINT_URL" if name == "endpoint" else f"AWS_{name.upper()}"
        monkeypatch.setenv(where, str(value))
    assert run(["versions", s3.run]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == s3.url
    assert run(["versions", s3.run, "--all"]) == 0
    assert NEWEST in capsys.readouterr().out
