"""What a process may use, read from trees of files as the kernel writes them."""

from __future__ import annotations

import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from asyncloader._memory.allowance import address_space, free_memory, processor_quota, processors

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

GROUPS = "sys/fs/cgroup"
V2 = "30 25 0:26 {top} /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup rw,nsdelegate\n"
V1 = (
    "25 1 8:1 / / rw - ext4 /dev/sda rw\n"
    "33 25 0:30 {top} /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"
    "34 25 0:31 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
)
UNLIMITED = 9223372036854771712


def tree(root: Path, mounts: str, group: str, files: Mapping[str, object]) -> Path:
    """Write the files of a machine that has 1000 kB of memory and 100 kB of swap to give."""
    whole = {
        "proc/meminfo": "MemTotal: 9999 kB\nMemAvailable:  1000 kB\nSwapFree:  100 kB\n",
        "proc/self/mountinfo": mounts,
        "proc/self/cgroup": group,
        **{f"{GROUPS}/{name}": content for name, content in files.items()},
    }
    for name, content in whole.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root


def test_without_groups_the_machine_is_the_limit(tmp_path: Path) -> None:
    assert free_memory(tmp_path) is None
    assert processor_quota(tmp_path) is None
    root = tree(tmp_path, "25 1 8:1 / / rw - ext4 /dev/sda rw", "0::/", {})
    assert free_memory(root) == 1100 << 10
    assert processor_quota(root) is None


def test_facts_that_lack_what_is_available_say_nothing(tmp_path: Path) -> None:
    root = tree(tmp_path, "", "", {})
    (root / "proc/meminfo").write_text("MemTotal:  9 kB\nSwapFree:  1 kB\n")
    assert free_memory(root) is None


def test_a_group_has_left_its_limit_less_what_is_used_and_not_cached(tmp_path: Path) -> None:
    files = {
        "a/memory.max": 500_000,
        "a/memory.current": 300_000,
        "a/memory.stat": "anon 200000\nfile 90000\ninactive_file 50000\nactive_file 7000",
        "a/memory.swap.max": 0,
    }
    assert free_memory(tree(tmp_path, V2.format(top="/"), "0::/a", files)) == 257_000


def test_swap_counts_as_far_as_the_group_may_use_it(tmp_path: Path) -> None:
    files = {"a/memory.max": 500_000, "a/memory.current": 300_000}
    root = tree(tmp_path, V2.format(top="/"), "0::/a", files)
    assert free_memory(root) == 200_000 + (100 << 10)
    swap = {"a/memory.swap.max": 5000, "a/memory.swap.current": 1000}
    assert free_memory(tree(tmp_path, V2.format(top="/"), "0::/a", files | swap)) == 204_000


@pytest.mark.parametrize("tight", ["", "a/", "a/b/"])
def test_the_tightest_group_on_the_way_up_decides(tight: str, tmp_path: Path) -> None:
    files: dict[str, object] = {}
    for folder in ("", "a/", "a/b/"):
        files[f"{folder}memory.max"] = 90_000 if folder == tight else "max"
        files[f"{folder}memory.current"] = 50_000
        files[f"{folder}memory.swap.max"] = 0
        files[f"{folder}cpu.max"] = "250000 100000" if folder == tight else "max 100000"
    root = tree(tmp_path, V2.format(top="/"), "0::/a/b", files)
    assert free_memory(root) == 40_000
    assert processor_quota(root) == 3


def test_a_group_that_is_over_its_limit_has_nothing_left(tmp_path: Path) -> None:
    files = {"memory.max": 5, "memory.current": 10, "memory.swap.max": 0}
    assert free_memory(tree(tmp_path, V2.format(top="/"), "0::/", files)) == 0


@pytest.mark.parametrize(("top", "counts"), [("/../other", False), ("/b", False), ("/..", True)])
def test_of_other_mounts_those_of_groups_above_ours_count(
    tmp_path: Path, top: str, counts: bool
) -> None:
    mounts = V2.format(top="/") + V2.format(top=top).replace("/sys/fs/cgroup", "/mnt/other")
    root = tree(tmp_path, mounts, "0::/a", {})
    (root / "mnt/other").mkdir(parents=True)
    for name, text in {"memory.max": 9000, "memory.current": 9000, "cpu.max": "100 100"}.items():
        (root / "mnt/other" / name).write_text(f"{text}\n")
    assert free_memory(root) == (100 << 10 if counts else 1100 << 10)
    assert processor_quota(root) == (1 if counts else None)


@pytest.mark.parametrize("top", ["/", "/docker/7f"])
def test_a_container_of_version_1_sees_its_group_in_either_way(top: str, tmp_path: Path) -> None:
    at = "docker/7f/" if top == "/" else ""
    files = {
        f"memory/{at}memory.limit_in_bytes": 450_000,
        f"memory/{at}memory.usage_in_bytes": 400_000,
        f"memory/{at}memory.stat": "cache 9\ntotal_inactive_file 1000\ntotal_active_file 200",
        f"memory/{at}memory.memsw.limit_in_bytes": 460_000,
        f"memory/{at}memory.memsw.usage_in_bytes": 400_000,
        f"cpu,cpuacct/{at}cpu.cfs_quota_us": 50_000,
        f"cpu,cpuacct/{at}cpu.cfs_period_us": 100_000,
    }
    group = "4:memory:/docker/7f\n3:cpu,cpuacct:/docker/7f\n1:name=systemd:/\n0::/"
    root = tree(tmp_path, V1.format(top=top), group, files)
    assert free_memory(root) == 61_200
    assert processor_quota(root) == 1


def test_no_limit_is_none_in_version_1(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": UNLIMITED,
        "memory/memory.usage_in_bytes": 400_000,
        "cpu,cpuacct/cpu.cfs_quota_us": -1,
        "cpu,cpuacct/cpu.cfs_period_us": 100_000,
    }
    root = tree(tmp_path, V1.format(top="/"), "4:memory:/\n3:cpu,cpuacct:/", files)
    assert free_memory(root) == 1100 << 10
    assert processor_quota(root) is None


def test_the_limit_on_address_space_counts(tmp_path: Path) -> None:
    root = tree(tmp_path, "", "", {})
    assert free_memory(root, address_space=5000) == 5000
    assert free_memory(root, address_space=-3) == 0


LIMITED = """
import resource
from pathlib import Path
from asyncloader._memory.allowance import address_space
page = resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (1 << 45, resource.getrlimit(resource.RLIMIT_AS)[1]))
used = int(Path("/proc/self/statm").read_text().split()[0]) * page
assert abs((1 << 45) - used - address_space()) < 1 << 20
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_limit_on_address_space_leaves_what_is_not_taken(tmp_path: Path) -> None:
    if resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY:
        assert address_space() is None
    subprocess.run([sys.executable, "-c", LIMITED], check=True)


def test_processors_are_no_more_than_the_quota() -> None:
    assert processors(1) == 1
    assert processors(10**6) == processors(None) >= processors() >= 1
