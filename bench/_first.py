"""Makes and loads the first table of a process, and prints the seconds that each took, as JSON.

python -m bench._first FOLDER
"""

from __future__ import annotations

import json
import sys
import time

from asyncloader import HashTable, Loader

begin = time.perf_counter()


def main(folder: str) -> None:
    """Make a table as the checkpoint in `folder` has it, and load it."""
    table = HashTable([4], name="emb")
    made = time.perf_counter()
    Loader(folder, {"emb": table}, strict=True).load()
    loaded = time.perf_counter()
    print(json.dumps({"made": made - begin, "loaded": loaded - begin, "ids": len(table)}))


if __name__ == "__main__":
    main(sys.argv[1])
