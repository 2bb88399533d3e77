"""One target under atheris, which looks for bytes that reach new code: `python -m tests.fuzz`."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING

import atheris

from .choices import padded

if TYPE_CHECKING:
    from collections.abc import Callable

FOLDER = Path(".fuzz")
MODULES = {
    "header": "parsers",
    "names": "parsers",
    "weight-map": "parsers",
    "load": "loads",
    "read": "loads",
    "runs": "loads",
    "rules": "rules",
    "archive": "torch_files",
    "pickle": "torch_files",
}
"""Where each target is."""

# A hang ends after as many seconds; what takes as many MiB at once is a bug, too.
OPTIONS = [
    "-timeout=30",
    "-rss_limit_mb=6000",
    "-malloc_limit_mb=256",
    "-max_len=300",
    "-len_control=0",
]


INSTRUMENTED = ["asyncloader._checkpoint", "asyncloader._planning"]


def target_of(name: str) -> Callable[[bytes], None]:
    """Import a target; which branches are taken is seen in what reads and decides."""
    with atheris.instrument_imports(include=INSTRUMENTED):
        for package in map(import_module, INSTRUMENTED):
            for found in iter_modules(package.__path__):
                import_module(f"{package.__name__}.{found.name}")
    # Out here: Numba does not compile what is imported in there.
    target: Callable[[bytes], None] = import_module(f"tests.fuzz.{MODULES[name]}").TARGETS[name]
    return lambda data: target(padded(data))


def main() -> None:
    """Run one target; the process ends with it."""
    logging.disable(logging.CRITICAL)  # loads warn of what is odd, and all of this is
    name, *arguments = sys.argv[1:]
    corpus = FOLDER / name
    corpus.mkdir(parents=True, exist_ok=True)
    files = [argument for argument in arguments if not argument.startswith("-")]
    options = [argument for argument in arguments if argument.startswith("-")]
    prefix = f"-artifact_prefix={FOLDER}/{name}-"
    atheris.Setup(
        [
            sys.argv[0],
            *OPTIONS,
            prefix,
            "-print_final_stats=1",
            *options,
            *(files or [str(corpus)]),
        ],
        target_of(name),
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main()
