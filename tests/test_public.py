"""What users can import, and what importing it costs them."""

from __future__ import annotations

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest

import asyncloader

ROOT = Path(asyncloader.__file__).parent


def public_modules() -> list[str]:
    """Name every module with no `_` before any part of its name."""
    parts = [path.relative_to(ROOT).with_suffix("").parts for path in ROOT.rglob("*.py")]
    named = [path[:-1] if path[-1] == "__init__" else path for path in parts]
    return sorted(
        ".".join((ROOT.name, *path))
        for path in named
        if not any(part.startswith("_") for part in path)
    )


def offered_names(path: Path) -> set[str]:
    """Return what a module defines and, if it is a package's own, what it lifts out of others."""
    lifts = path.name in {"__init__.py", "protocols.py"}
    names = set[str]()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                names.add(node.name)
            case ast.Assign():
                names.update(target.id for target in node.targets if isinstance(target, ast.Name))
            case ast.AnnAssign(target=ast.Name(id=name)):
                names.add(name)
            case ast.ImportFrom(level=level, module=module) if lifts:
                if level or f"{module}.".startswith(f"{ROOT.name}."):
                    names.update(alias.asname or alias.name for alias in node.names)
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("name", public_modules())
def test_all_lists_every_public_name_of_a_module_and_no_other(name: str) -> None:
    module = importlib.import_module(name)
    offered = {
        each
        for each in offered_names(Path(module.__file__ or ""))
        if not isinstance(getattr(module, each), TypeVar | ParamSpec)
    }

    listed = getattr(module, "__all__", ())

    assert len(listed) == len(set(listed)), "listed twice"
    assert [each for each in listed if not hasattr(module, each)] == [], "listed, not there"
    assert offered - set(listed) == set(), "there, not listed"


def test_the_public_names_are_those_that_are_listed() -> None:
    """A change of what users can import is a decision: change `data/public.json` with it."""
    listed = json.loads((Path(__file__).parent / "data" / "public.json").read_bytes())
    assert {name: sorted(importlib.import_module(name).__all__) for name in listed} == listed


@pytest.mark.parametrize("heavy", ["torch", "numba", "numpy"])
def test_importing_the_package_imports_nothing_that_takes_seconds(heavy: str) -> None:
    code = f"import sys, asyncloader; sys.exit({heavy!r} in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_are_told_that_the_package_is_typed() -> None:
    assert (ROOT / "py.typed").is_file()
