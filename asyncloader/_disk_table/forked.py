"""Locks in a process that was forked: a thread that held one may not be here."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class _Renewable(Protocol):
    def renew(self) -> None: ...


_all: weakref.WeakSet[_Renewable] = weakref.WeakSet()


def renew_after_fork(one: _Renewable) -> None:
    """Have `renew` called in each child process, as long as the object lives."""
    _all.add(one)


def _renew() -> None:
    for one in _all:
        one.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
