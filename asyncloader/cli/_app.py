"""The commands, and the exit codes of their failures."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import traceback
from typing import TYPE_CHECKING, Annotated

import typer

from asyncloader import __version__
from asyncloader._display import escaped

from . import _listing, _looking, _moving
from ._common import EXPECTED, drop_output, examples, message_of, prepare, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

_FAILED = 2
_INTERRUPTED = 130
# The program that read our output has gone: the code of a program that this signal has ended.
_PIPE_CLOSED = 141

app = typer.Typer(
    name="asyncloader",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help that wraps as it should, and that no bracket can break
    invoke_without_command=True,
    epilog=examples(
        ("asyncloader inspect runs/ctr/1200", "what does it hold?"),
        ("asyncloader versions runs/ctr", "which checkpoints are there?"),
        ("asyncloader show runs/ctr/1200 item_emb --id 42", "what does it know of item 42?"),
        ("asyncloader load runs/ctr/1200", "can it be loaded, and how fast?"),
        ("asyncloader verify runs/ctr/1200", "is all of it as it was written?"),
        ("asyncloader diff runs/ctr/1100 runs/ctr/1200", "what has changed?"),
        ("asyncloader convert runs/ctr/1200 ctr.safetensors", "one file, for any program"),
        codes="Exit codes: 0, done; 1, the answer is no (an id that is not there, say); 2, it "
        "failed, and stderr says why.",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _asyncloader(
    context: typer.Context,
    *,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Look into the checkpoints of recommendation models.

    A checkpoint is a folder of safetensors files that RecIS, a trainer of such models, or
    asyncloader itself has written. It holds dense tensors, each under its name, and hash tables:
    ids (of users, items, words), each with a row of numbers, its embedding, and with the
    optimizer's state. Plain .safetensors files, which hold tensors only, can be read, too.
    """
    if version:
        typer.echo(f"asyncloader {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit


app.command("inspect", epilog=_looking.INSPECT_EPILOG)(_looking.inspect)
app.command("versions", epilog=_listing.EPILOG)(_listing.versions)
app.command("show", epilog=_looking.SHOW_EPILOG)(_looking.show_one)
app.command("load", epilog=_moving.LOAD_EPILOG)(_moving.load)
app.command("verify", epilog=_looking.VERIFY_EPILOG)(_looking.verify)
app.command("diff", epilog=_looking.DIFF_EPILOG)(_looking.diff)
app.command("bank", epilog=_looking.BANK_EPILOG)(_looking.bank)
app.command("convert", epilog=_moving.CONVERT_EPILOG)(_moving.convert)


def main() -> None:
    """Run the command line, and exit."""
    # All that was imported stays: to look through it for garbage would take time, again and again.
    gc.freeze()
    sys.exit(run(sys.argv[1:]))


def run(arguments: Sequence[str]) -> int:
    """Run a command line and return its exit code; expected failures are one line on stderr."""
    prepare()
    # Commands print warnings as a part of their results, but for what a person waits meanwhile.
    logging.getLogger("asyncloader").addHandler(logging.NullHandler())
    for name in ("retrying", "cache"):
        logging.getLogger(f"asyncloader._storage.{name}").addHandler(_TELLING)
    as_json = "--json" in arguments
    try:
        return _carry_out(arguments, as_json=as_json)
    except (BrokenPipeError, SystemExit):  # the second is typer's own, where it prints help
        drop_output()
        return _PIPE_CLOSED


class _Telling(logging.Handler):
    """Tells on stderr why nothing seems to happen."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # it is no reason to fail
            typer.echo(f"asyncloader: {escaped(record.getMessage())}", err=True)


_TELLING = _Telling(logging.WARNING)


def _carry_out(arguments: Sequence[str], *, as_json: bool) -> int:
    try:
        code = app(list(arguments), prog_name="asyncloader", standalone_mode=False)
    except BrokenPipeError:
        raise
    except EXPECTED as error:
        return _fail(error, message_of(error), as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except Exception as error:  # noqa: BLE001  # exit code 1 would be an answer
        # An error in the arguments. Its class has moved between typer's releases.
        describe = getattr(error, "format_message", None)
        if describe is not None:
            return _fail(error, describe(), as_json=as_json)
        traceback.print_exc()
        problem = f"a bug, or a broken installation: {type(error).__name__}: {error}"
        return _fail(error, problem, as_json=as_json)
    return code if isinstance(code, int) else 0


def _fail(error: Exception, message: str, *, as_json: bool) -> int:
    """Tell of a failure on stderr, and in a JSON document; return the exit code."""
    from ._terminal import complain

    try:
        complain(message)
        if as_json:
            print_json({"error": {"type": type(error).__name__, "message": message}})
    except BrokenPipeError:
        raise
    except OSError:  # such as a disk that is full: the code says that it failed
        drop_output()
    return _FAILED
