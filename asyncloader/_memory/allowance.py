"""How much memory and how many processors this process may use, which may be less than there is.

A container sees the memory and the processors of its machine. The kernel's control groups, of
version 1 or 2, hold it to less, and a group may use no more than the groups above it.
"""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


_FACT = re.compile(rb"^(MemAvailable|SwapFree): *([0-9]+) kB$", re.MULTILINE)
_STATISTIC = re.compile(rb"^(\w+) ([0-9]+)$", re.MULTILINE)
_GROUP = re.compile(r"^[0-9]+:([^:]*):(.*)$", re.MULTILINE)
_MOUNT = re.compile(r"^\S+ \S+ \S+ (\S+) (\S+) .*- (cgroup2?) \S+ (\S+)$", re.MULTILINE)
_ROOT = Path("/")
_CACHED = (b"inactive_file", b"active_file")


def free_memory(root: Path = _ROOT, address_space: int | None = None) -> int | None:
    """Return the bytes that this process can still get, swap included; `None` if unknown.

    Args:
        root: The folder of `proc` and of the groups' folders.
        address_space: Bytes that the limit on address space leaves; `None` is no limit.
    """
    free = [] if address_space is None else [address_space]
    swap = 0
    facts = dict(_FACT.findall(_read(root / "proc/meminfo")))
    if b"MemAvailable" in facts:
        swap = int(facts.get(b"SwapFree", 0)) << 10
        free.append((int(facts[b"MemAvailable"]) << 10) + swap)
    for group in _groups(root, "memory"):
        free += _left(group, swap)
    return max(min(free), 0) if free else None


def address_space(statm: Path = Path("/proc/self/statm")) -> int | None:
    """Return the bytes that the limit on address space leaves; `None` if there is none."""
    if sys.platform == "win32":
        return None
    import resource  # noqa: PLC0415  # not there on Windows

    most, _ = resource.getrlimit(resource.RLIMIT_AS)
    pages = _read(statm).split()
    if most == resource.RLIM_INFINITY or not pages:
        return None
    return most - int(pages[0]) * resource.getpagesize()


def processor_quota(root: Path = _ROOT) -> int | None:
    """Return how many processors the groups' quotas of time are worth; `None` if there is none."""
    shares = []
    for group in _groups(root, "cpu"):
        quota, _, period = _read(group / "cpu.max").strip().partition(b" ")
        if not quota:
            quota = _read(group / "cpu.cfs_quota_us").strip()
            period = _read(group / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period):  # "max" and -1 are no limit
            shares.append(math.ceil(int(quota) / int(period)))
    return max(min(shares), 1) if shares else None


def _left(group: Path, swap: int) -> Iterator[int]:
    """Yield the bytes that a group leaves, by each of its limits."""
    facts = dict(_STATISTIC.findall(_read(group / "memory.stat")))
    most_swap = _number(group / "memory.swap.max")  # in version 2
    left_swap = swap
    if most_swap is not None:
        used_swap = _number(group / "memory.swap.current") or 0
        left_swap = min(swap, max(most_swap - used_swap, 0))
    for limit, usage, prefix, more in (
        ("memory.max", "memory.current", b"", left_swap),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", b"total_", swap),
        ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes", b"total_", 0),
    ):
        most, used = _number(group / limit), _number(group / usage)
        if most is not None and used is not None:
            # Bytes of files count as used, and the kernel drops them for a program.
            cached = (int(facts.get(prefix + name, 0)) for name in _CACHED)
            yield most - used + sum(cached) + more


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of this process's groups and of the groups above, of both versions."""
    groups = _read(root / "proc/self/cgroup").decode(errors="surrogateescape")
    paths = {name: path for names, path in _GROUP.findall(groups) for name in names.split(",")}
    mounts = _read(root / "proc/self/mountinfo").decode(errors="surrogateescape")
    for top, point, system, options in _MOUNT.findall(mounts):
        is_2 = system == "cgroup2"
        path = paths.get("" if is_2 else controller)
        if path is None or not (is_2 or controller in options.split(",")):
            continue
        ours, whole = PurePosixPath(path), PurePosixPath(top)
        folder = root / point.lstrip("/")
        if ours.is_relative_to(whole):
            yield folder
            for part in ours.relative_to(whole).parts:
                folder /= part
                yield folder
        elif set(whole.parts[1:]) == {".."}:  # it is above the root that the process sees
            yield folder


def _number(file: Path) -> int | None:
    text = _read(file).strip()
    return int(text) if text.isdigit() else None  # "max" is no limit


def _read(file: Path) -> bytes:
    """Return a file's content; nothing if it cannot be read, as on other systems than Linux."""
    try:
        return file.read_bytes()
    except OSError:
        return b""


# Read once: event loops ask, and must not wait for files.
_QUOTA = processor_quota()


def processors(quota: int | None = _QUOTA) -> int:
    """Return how many processors this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    count = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return count if quota is None else min(count, quota)
