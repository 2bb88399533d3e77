"""Folders of Hugging Face's libraries: variants, other names, and what is beside the model."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from asyncloader import CheckpointError, CheckpointNotFoundError, load_tensors
from asyncloader.cli import run

if TYPE_CHECKING:
    from pathlib import Path

W, V = torch.arange(4.0), torch.ones(2)


def sharded(folder: Path, stem: str, index: str) -> Path:
    """Write two shards and their weight map."""
    files = {name: f"{stem}-{n}-of-2.safetensors" for n, name in enumerate("wv")}
    save_file({"w": W}, folder / files["w"])
    save_file({"v": V}, folder / files["v"])
    (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return folder / index


@pytest.mark.parametrize(
    "name",
    [
        "model.fp16.safetensors",
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bf16.safetensors",
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
    ],
)
def test_one_file_is_found_by_its_librarys_name(tmp_path: Path, name: str) -> None:
    save_file({"w": W}, tmp_path / name)
    (tmp_path / "config.json").write_text("{}")
    assert torch.equal(load_tensors(tmp_path)["w"], W)
    assert run(["verify", str(tmp_path)]) == 0
    assert run(["inspect", str(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("stem", "index"),
    [
        ("model.fp16", "model.safetensors.index.fp16.json"),
        ("diffusion_pytorch_model", "diffusion_pytorch_model.safetensors.index.json"),
    ],
)
def test_a_weight_map_of_another_name_is_found_in_its_folder_and_by_its_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stem: str, index: str
) -> None:
    path = sharded(tmp_path, stem, index)
    for what in (tmp_path, path):
        found = load_tensors(what)
        assert torch.equal(found["w"], W)
        assert torch.equal(found["v"], V)
        assert run(["verify", str(what)]) == 0
        capsys.readouterr()
        assert run(["inspect", str(what), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["kind"] == "Hugging Face folder"


def test_the_plain_one_comes_before_variants_and_several_variants_are_named(tmp_path: Path) -> None:
    for variant in ("fp16", "bf16"):
        save_file({"w": V}, tmp_path / f"model.{variant}.safetensors")
    with pytest.raises(CheckpointError, match=r"'model\.bf16\.safetensors', 'model\.fp16\.safet"):
        load_tensors(tmp_path)
    save_file({"w": W}, tmp_path / "model.safetensors")
    assert torch.equal(load_tensors(tmp_path)["w"], W)


def test_a_weight_map_of_one_variant_does_not_win_over_the_file_of_another(tmp_path: Path) -> None:
    index = sharded(tmp_path, "model.bf16", "model.safetensors.index.bf16.json")
    assert load_tensors(tmp_path).keys() == {"w", "v"}
    save_file({"w": V}, tmp_path / "model.bf16.safetensors")  # the same variant as one file
    assert load_tensors(tmp_path).keys() == {"w", "v"}
    save_file({"w": V}, tmp_path / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=rf"'{index.name}', 'model\.fp16\.safetensors'"):
        load_tensors(tmp_path)
    assert run(["verify", str(tmp_path)]) == 2
    save_file({"w": -W}, tmp_path / "model.safetensors")
    assert torch.equal(load_tensors(tmp_path)["w"], -W)


@pytest.mark.parametrize("kind", ["a folder", "a text", "json"])
@pytest.mark.parametrize("name", ["model.safetensors", "adapter_model.safetensors"])
def test_something_else_may_be_called_index_beside_the_model(
    tmp_path: Path, kind: str, name: str
) -> None:
    save_file({"w": W}, tmp_path / name)
    if kind == "a folder":
        (tmp_path / "index").mkdir()
    else:
        (tmp_path / "index").write_text("of contents" if kind == "a text" else "{}")
    assert torch.equal(load_tensors(tmp_path)["w"], W)
    assert run(["verify", str(tmp_path)]) == 0


def test_an_index_alone_is_still_judged_as_one(tmp_path: Path) -> None:
    (tmp_path / "index").write_text("of contents")
    with pytest.raises(CheckpointError, match="index"):
        load_tensors(tmp_path)


def test_where_nothing_fits_the_error_says_what_is_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").touch()
    with pytest.raises(
        CheckpointNotFoundError, match=r"the folder holds 'config\.json', 'pytorch_model\.bin'"
    ):
        load_tensors(tmp_path)


def test_inspect_shows_the_rest_beside_a_name_that_no_file_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sharded(tmp_path, "model", "model.safetensors.index.json")
    index = json.loads(path.read_text())
    index["weight_map"] |= {f"ghost{n}": index["weight_map"]["w"] for n in range(25)}
    path.write_text(json.dumps(index))
    assert run(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in found["tensors"]] == ["w", "v"]
    assert "'ghost0'" in found["warnings"][0]
    assert found["warnings"][-1] == "and 5 more like it"


@pytest.mark.parametrize("command", [["inspect"], ["show", "w"]], ids=["inspect", "show"])
def test_the_free_text_of_headers_is_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    path = tmp_path / "model.safetensors"
    metadata = {"format": "pt", "step": "\x1b[31m7", "long": "x" * 999}
    save_file({"w": W}, path, metadata=metadata)
    name, *others = command
    assert run([name, str(path), *others, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"] == {path.name: metadata}
    assert run([name, str(path), *others]) == 0
    out = capsys.readouterr().out
    assert "format: pt" in out
    assert "\x1b[31m7" not in out
    assert "x" * 201 not in out


def test_free_text_that_differs_from_file_to_file_says_whose_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"w": "a.safetensors", "v": "b.safetensors"}
    for name, file in files.items():
        save_file({name: W}, tmp_path / file, metadata={"of": name})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert run(["inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["metadata"]
    assert found == {"a.safetensors": {"of": "w"}, "b.safetensors": {"of": "v"}}
    assert run(["inspect", str(tmp_path)]) == 0
    assert "a.safetensors: of: w" in capsys.readouterr().out
    assert run(["show", str(tmp_path), "v"]) == 0
    assert "of: v" in capsys.readouterr().out
