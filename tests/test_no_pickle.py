"""Nothing in the package runs what it reads: no pickle, no `eval`, in any of its disguises."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import asyncloader

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULES = {
    "pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "dbm",
    "code", "codeop", "pty", "yaml", "imp", "runpy", "torch.jit", "torch.package", "zipimport",
}  # fmt: skip
BUILTINS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
METHODS = {
    "torch.load": "weights_only",
    "numpy.load": "allow_pickle",
    "os.system": None,
    "os.popen": None,
    "numpy.fromfile": None,
    "ctypes.CDLL": None,
}
"""Calls, and the keyword that makes them harmless: with the value below."""

HARMLESS = {"weights_only": True, "allow_pickle": False}


def dangers(source: str) -> Iterator[str]:
    """Yield what a module imports or calls that may run what it reads."""
    nodes = ast.parse(source)
    known = dict(_imports(nodes))
    for name, real in known.items():
        if any(real == module or real.startswith(f"{module}.") for module in MODULES):
            yield f"{real} as {name}"
    for call in ast.walk(nodes):
        if isinstance(call, ast.Call):
            name = _name(call.func, known)
            if name in BUILTINS or (name in METHODS and not _is_harmless(call, METHODS[name])):
                yield f"{name}() in line {call.lineno}"
        elif isinstance(call, ast.Name | ast.Attribute) and _name(call, known) in BUILTINS:
            yield f"{_name(call, known)} in line {call.lineno}"


def _imports(nodes: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(nodes):
        if isinstance(node, ast.Import):
            for one in node.names:
                yield (
                    one.asname or one.name.partition(".")[0],
                    one.name
                    if one.asname
                    else (one.name if one.name in MODULES else one.name.partition(".")[0]),
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for one in node.names:
                yield one.asname or one.name, f"{node.module}.{one.name}"


def _name(node: ast.expr, known: dict[str, str]) -> str:
    """Return what a name stands for: `np.load` is `numpy.load`."""
    if isinstance(node, ast.Attribute):
        return f"{_name(node.value, known)}.{node.attr}".removeprefix("builtins.")
    return (
        known.get(node.id, node.id).removeprefix("builtins.") if isinstance(node, ast.Name) else ""
    )


def _is_harmless(call: ast.Call, keyword: str | None) -> bool:
    if _is_of_this_program(call):
        return True
    given = {one.arg: one.value for one in call.keywords}
    value = given.get(keyword)
    return (
        keyword is not None and isinstance(value, ast.Constant) and value.value is HARMLESS[keyword]
    )


def _is_of_this_program(call: ast.Call) -> bool:
    """Tell `CDLL(None)`, the functions of the program that runs, from other libraries."""
    first = call.args[0] if call.args else None
    return isinstance(first, ast.Constant) and first.value is None


FOLDER = Path(asyncloader.__file__).parent
ALLOWED = {"_table/compiling.py": ["pickle as pickle"]}
"""Numba's cache of machine code: our own code, from a folder that only this user writes to."""


@pytest.mark.parametrize(
    "path", sorted(FOLDER.rglob("*.py")), ids=lambda path: str(path.relative_to(FOLDER))
)
def test_no_module_runs_what_it_reads(path: Path) -> None:
    allowed = ALLOWED.get(str(path.relative_to(FOLDER)), [])
    assert list(dangers(path.read_text(encoding="utf-8"))) == allowed


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import pickle as p",
        "from pickle import loads",
        "import torch.jit",
        "from marshal import load as read",
        "def f():\n    import shelve",
        "import yaml",
        "eval(text)",
        "list(map(eval, texts))",
        "import builtins\nbuiltins.exec(text)",
        "compile(text, '', 'exec')",
        "__import__(name)",
        "import torch\ntorch.load(path)",
        "import torch\ntorch.load(path, weights_only=False)",
        "import torch\ntorch.load(path, weights_only=switch)",
        "from torch import load\nload(path)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import os\nos.system(text)",
    ],
)
def test_what_runs_what_it_reads_is_found(source: str) -> None:
    assert list(dangers(source)) != []


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(path, weights_only=True)",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import re\nre.compile(text)",
        "loop.run_until_complete(x)",
        "import orjson\norjson.loads(text)",
        "from .pickle import x",
    ],
)
def test_what_does_not_is_not(source: str) -> None:
    assert list(dangers(source)) == []
