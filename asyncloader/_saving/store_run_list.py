"""The list of a run's checkpoints in an object store, where nobody can hold it."""

from __future__ import annotations

import contextlib
import errno
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from asyncloader._checkpoint.format import RUN_LIST

from .run_list import RunList, text_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from asyncloader._storage.folder import ConditionalFolder


_TRIES = 20
_PAUSE = 0.5


@dataclass(slots=True)
class StoreRunList(RunList):
    """The list in a place that nobody can hold: written anew if it is what it was."""

    folder: ConditionalFolder

    def staged(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing."""
        return contextlib.nullcontext()

    def _alone(self) -> contextlib.AbstractContextManager[None]:
        """Do nothing: conditions keep others from what is decided by them."""
        return contextlib.nullcontext()

    def publish(self) -> None:
        """Put our line at the end.

        Raises:
            SaveError: If that fails.
        """
        try:
            self._change(self.with_ours)
        except OSError as error:
            raise self.unlisted(error) from error

    def _strike(self, gone: set[str]) -> None:
        """Remove lines."""
        self._change(lambda lines: [line for line in lines if line not in gone])

    def _change(self, change: Callable[[list[str]], list[str]]) -> None:
        for _ in range(_TRIES):
            before = self.folder.stat(RUN_LIST)
            text = text_of(change(self.lines()))
            try:
                self.folder.put(RUN_LIST, text, over=before)
            except FileExistsError:  # another save has changed it meanwhile
                time.sleep(random.uniform(0, _PAUSE))  # noqa: S311  # no secret
                continue
            except OSError as error:
                if error.errno != errno.ENOTSUP:
                    raise
                self._overwrite(text)
            return
        raise OSError(errno.EBUSY, f"others have changed it {_TRIES} times meanwhile")

    def _overwrite(self, text: bytes) -> None:
        """Write the list in a store that knows no such condition."""
        with contextlib.closing(self.folder.create(RUN_LIST)) as file:
            file.write(0, [memoryview(text)])
            file.sync()
