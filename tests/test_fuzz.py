"""A sample of what `make fuzz` does for hours: see `tests/fuzz`."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from asyncloader import AsyncLoaderError, load_tensors
from tests.fuzz import loads, parsers, rules, torch_files
from tests.fuzz.choices import Choices, padded
from tests.fuzz.drafts import SIDECAR, draft_of, shard_of, sidecar_of, spoiled
from tests.fuzz.trees import Members, tree
from tests.oracle.strict import Refused, StrictFolder, strict_header
from tests.support import raw

if TYPE_CHECKING:
    from torch import Tensor

inputs = st.binary(max_size=40).map(padded)


@pytest.mark.parametrize("target", parsers.TARGETS)
@settings(max_examples=300)
@given(data=inputs)
def test_parsers_find_what_the_strict_reader_finds_or_refuse(target: str, data: bytes) -> None:
    parsers.TARGETS[target](data)


@pytest.mark.parametrize("target", loads.TARGETS)
@settings(max_examples=60)
@given(data=inputs)
def test_a_load_equals_what_the_strict_reader_says_or_fails_and_writes_nothing(
    target: str, data: bytes
) -> None:
    loads.TARGETS[target](data)


@pytest.mark.parametrize("target", torch_files.TARGETS)
@settings(max_examples=300)
@given(data=inputs)
def test_a_file_of_torch_holds_what_torch_reads_or_is_refused(target: str, data: bytes) -> None:
    torch_files.TARGETS[target](data)


@settings(max_examples=300)
@given(data=inputs)
def test_what_verify_finds_sound_loads_and_what_it_finds_faulty_does_not(data: bytes) -> None:
    rules.rules(data)


@pytest.mark.parametrize("kind", ["recis", "plain"])
@pytest.mark.parametrize("number", range(8))
def test_what_is_not_spoiled_loads_whole(kind: str, number: int) -> None:
    """Or else all of the above would hold because all is refused."""
    files = spoiled(draft_of(kind, number), Choices(b""))
    folder = StrictFolder(files)
    for name in folder.tensors:
        assert folder.tensor(name) is not None
    assert loads.check_load(files, half=False)
    assert loads.check_load(files, half=True)
    assert loads.check_read(files)
    assert rules.check_rules(files)
    with loads.folder_of(files) as path:
        assert set(load_tensors(path)) == set(folder.tensors)


@settings(max_examples=200)
@given(data=inputs)
def test_what_safetensors_refuses_we_refuse_and_what_both_read_agrees(data: bytes) -> None:
    stored = {
        "a": torch.arange(6.0).view(2, 3),
        "b": torch.tensor([True, False, True]),
        "": torch.zeros(0, 2),
        "s:0": torch.tensor(7),
    }
    whole = save(stored, metadata={"format": "pt"})
    start = 8 + int.from_bytes(whole[:8], "little")
    entries = strict_header(whole, recis=False)
    document = Members([['"__metadata__"', tree({"format": "pt"})]])
    for key, (dtype, shape, begin, end) in entries.items():
        entry = {"dtype": dtype, "shape": shape, "data_offsets": [begin - start, end - start]}
        document.append([json.dumps(key), tree(entry)])
    content = shard_of(document, whole[start:], Choices(data))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(content)
        theirs, mine = _of_safetensors(path), _of_ours(path)
    if mine is not None:
        assert theirs is not None
        assert {name: raw(tensor) for name, tensor in mine.items()} == {
            name: raw(tensor) for name, tensor in theirs.items()
        }


def _of_safetensors(path: Path) -> dict[str, Tensor] | None:
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, ValueError, RuntimeError):
        return None


def _of_ours(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_tensors(path)
    except AsyncLoaderError:
        return None


def test_the_strict_reader_compares_digests() -> None:
    """It judges all others, so it has to see what is wrong."""
    draft = draft_of("recis", 3)
    files = spoiled(draft, Choices(b""))
    files[SIDECAR] = json.dumps(sidecar_of(files, draft.headers, draft.parts)).encode()
    good = StrictFolder(files)
    assert [good.tensor(name) for name in good.tensors] != []
    file = next(name for name, data in draft.data.items() if data)
    files[file] = files[file][:-1] + bytes([files[file][-1] ^ 1])
    bad = StrictFolder(files)
    with pytest.raises(Refused, match="other bytes"):
        [bad.block(key, file) for key in draft.headers[file]]
