"""Arguments and options that several commands have."""

from __future__ import annotations

from typing import Annotated

import typer

from asyncloader._arguments import check_no_url


def _given(path: str) -> str:
    if not path:
        raise typer.BadParameter("it is empty")
    try:
        check_no_url(path, "it")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    return path


PathArgument = Annotated[
    str,
    typer.Argument(
        metavar="PATH",
        help="The checkpoint: a folder that RecIS wrote, a .safetensors file, or a folder of "
        "these, as Hugging Face's are.",
        show_default=False,
        callback=_given,
    ),
]

JsonFlag = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document, for other programs, complete."),
]

DirectFlag = Annotated[
    bool,
    typer.Option(
        "--direct-io",
        help="Read past the page cache, so that what others have there stays. Faster for files "
        "that are not in it, slower for those that are.",
    ),
]

LinksFlag = Annotated[
    bool,
    typer.Option(
        "--follow-symlinks",
        help="Read what lies outside of the folder, too, if a symbolic link in it says so, as in "
        "Hugging Face's cache.",
    ),
]


def examples(*lines: tuple[str, str], codes: str = "") -> str:
    """Return the end of a help text: command lines with what they are for, then exit codes."""
    width = max(len(command) for command, _ in lines)
    shown = "\n".join(f"{command:{width}}  # {purpose}" for command, purpose in lines)
    text = f"Examples:\n\n\b\n{shown}"  # \b: leave these lines as they are
    return f"{text}\n\n{codes}" if codes else text
