"""Draws the README's picture: the output of `asyncloader inspect` for the demo's checkpoint.

python -m examples.picture
"""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 84
PATH = "runs/ctr/1200"


def main() -> None:
    """Save the demo's checkpoint, inspect it as a user would, and draw what is printed."""
    with tempfile.TemporaryDirectory() as folder:
        demo = [sys.executable, "-m", "examples.demo", "--keep", f"{folder}/{PATH}"]
        subprocess.run(demo, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        shown = subprocess.run(
            [sys.executable, "-m", "asyncloader", "inspect", PATH],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
            env={**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH)},
        ).stdout
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    console.print(Text.from_ansi(shown.rstrip()))
    svg = console.export_svg(title=f"$ asyncloader inspect {PATH}")
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # fonts from the network
    (ROOT / "docs" / "inspect.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
