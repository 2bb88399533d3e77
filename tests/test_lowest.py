"""The releases of `make test-lowest`."""

from __future__ import annotations

import re
import tomllib
from itertools import chain
from pathlib import Path

import torch

from asyncloader._loading.buffers import bump_versions

ROOT = Path(__file__).resolve().parents[1]


def test_the_lowest_releases_are_those_that_are_declared() -> None:
    """`make test-lowest` runs on them: a bound that nothing runs on is a guess."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = [*project["dependencies"], *chain.from_iterable(extras)]
    pins = (ROOT / "constraints-lowest.txt").read_text()
    lowest = dict(re.findall(r"^([\w-]+)==([\d.]+)$", pins, re.MULTILINE))
    bounds = dict(re.findall(r"^([\w-]+)>=([\d.]+)", "\n".join(declared), re.MULTILINE))
    assert len(bounds) == len(declared)
    del bounds["torch"]  # what constraints.txt has: others are gigabytes
    assert set(bounds) == set(lowest)
    for name, bound in bounds.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", lowest[name]), name


def test_a_torch_that_takes_no_list_is_told_of_each_tensor() -> None:
    told = []

    def increment(tensor: object) -> None:
        if not isinstance(tensor, torch.Tensor):
            raise RuntimeError("increment_version expect a Tensor as input")  # noqa: TRY004  # as torch 2.4
        told.append(tensor)

    tensors = [torch.ones(1), torch.ones(2)]
    bump_versions(tensors, increment)
    assert list(map(id, told)) == list(map(id, tensors))
