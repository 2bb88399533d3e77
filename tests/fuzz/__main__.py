"""Runs the fuzzers: `python -m tests.fuzz [target [-runs=N] [-max_total_time=S] [input …]]`.

Without a target, each of them for a minute. What is found stays in `.fuzz`: a corpus for each,
and the input of each failure.
"""

from __future__ import annotations

import subprocess
import sys

from .driver import MODULES


def run(target: str, *arguments: str) -> int:
    """Run one target in a process of its own, which libFuzzer ends as it pleases."""
    print(f"fuzzing {target}", flush=True)  # noqa: T201  # a tool speaks
    command = [sys.executable, "-m", "tests.fuzz.driver", target, *arguments]
    code = subprocess.run(command, check=False).returncode
    if code:
        print(  # noqa: T201
            f"\n{target} failed. Run it again with the file that was named above:\n"
            f"    make fuzz ARGS='{target} .fuzz/{target}-crash-…'"
        )
    else:
        print(f"fuzzing {target}: nothing found", flush=True)  # noqa: T201
    return code


def main() -> int:
    """Run the target that was named, or all."""
    target, *arguments = sys.argv[1:] or [""]
    if target in MODULES:
        return run(target, *arguments)
    if target:
        print(f"no target {target!r}; there are {', '.join(MODULES)}")  # noqa: T201
        return 2
    return max(run(each, "-max_total_time=60") for each in MODULES)


if __name__ == "__main__":
    sys.exit(main())
