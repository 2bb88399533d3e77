"""What the measurements are made on."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path

LIBRARIES = (
    "torch", "numba", "safetensors", "runai-model-streamer", "fastsafetensors", "tensorizer",
)  # fmt: skip


def machine() -> dict[str, str]:
    """Describe it, each value readable without its name."""
    facts = {
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "processor": _processor(),
        "cores": f"{os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "python": f"Python {platform.python_version()}",
    }
    for library in LIBRARIES:
        try:
            facts[library] = f"{library} {metadata.version(library)}"
        except metadata.PackageNotFoundError:
            facts[library] = f"no {library}"
    return facts


def stolen_seconds() -> float:
    """Return for how long the host let others run in this machine's place, so far.

    0 where nobody says so.
    """
    try:
        line = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        return 0.0
    return int(line.split()[8]) / os.sysconf("SC_CLK_TCK")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
