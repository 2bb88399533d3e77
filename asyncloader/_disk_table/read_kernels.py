"""The loops that read rows from files: through the page cache, and past it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from asyncloader._table.compiling import owner_of
from asyncloader._table.native import call4, call5, call6, copy, errno

from .kernels import kernel

if TYPE_CHECKING:
    from asyncloader._table.schema import Longs

_EAGAIN, _EINTR = 11, 4
_NOWAIT = 8
_WILLNEED = 3

ENDS_EARLY, STOPPED = -1, -2
"""In place of the number of an error: the file has no more bytes; the caller wants no more."""


@kernel(
    "i8(UniTuple(i8, 3), i8[::1], i8[::1], i8[::1], i8[::1], i8, i8, i8[::1], i8[::1], i8[::1])"
)
def read_ahead(
    calls: tuple[int, int, int],  # addresses: preadv2, errno_location, fadvise or 0
    firsts: Longs,  # [parts], ascending: the number of each part's first row
    fds: Longs,  # [parts], the file of each part
    offsets: Longs,  # [parts], where its first row begins in that file
    numbers: Longs,  # [n], the rows to read
    rows: int,  # the address of the memory for them, [n, width]
    width: int,
    ring: Longs,  # [window], rows that the device was asked for
    stop: Longs,  # [2]; the first not 0: end as soon as may be; the second counts rows that came
    seen: Longs,  # [4]; receives the error, which row it is of, rows waited for, rows under way
) -> int:
    """Read rows, each by a call: ask the device for many, and collect them later.

    A read that may not wait (RWF_NOWAIT) takes what is in the page cache, and has the device begin
    where it is not. `window` rows later a read that may wait collects it. Returns 0, or the number
    of the error.
    """
    preadv2, errno_location, fadvise = calls
    window = ring.shape[0]
    vector = np.empty(2, np.int64)
    there = vector.ctypes.data
    asked = 0
    collected = 0
    for at in range(numbers.shape[0] + window):
        if stop[0]:
            seen[0] = STOPPED
            return STOPPED
        if at < numbers.shape[0]:
            part = owner_of(firsts, numbers[at])
            begin = offsets[part] + (numbers[at] - firsts[part]) * width
            vector[0], vector[1] = rows + at * width, width
            if call5(preadv2, fds[part], there, 1, begin, _NOWAIT) == width:
                stop[1] += 1
                continue
            if fadvise:
                call4(fadvise, fds[part], begin, width, _WILLNEED)
            ring[asked % window] = at
            asked += 1
            if asked - collected < window:
                continue
        if collected == asked:
            break
        which = ring[collected % window]
        collected += 1
        part = owner_of(firsts, numbers[which])
        begin = offsets[part] + (numbers[which] - firsts[part]) * width
        done = 0
        while done < width:
            vector[0], vector[1] = rows + which * width + done, width - done
            count = call5(preadv2, fds[part], there, 1, begin + done, 0)
            if count > 0:
                done += count
                stop[1] += 1
                continue
            error = ENDS_EARLY if count == 0 else errno(errno_location)
            if error == _EINTR and not stop[0]:
                continue
            seen[0], seen[1], seen[2] = error, which, asked
            return error
    seen[2] = asked
    return 0


@kernel(
    "i8(UniTuple(i8, 4), i8, i8[::1], i8[::1], i8[::1], i8[::1], i8, i8, i8, i8, i8, i8[:, ::1], "
    "i8[:, ::1], i8[::1], i8[::1])"
)
def read_direct(
    calls: tuple[int, int, int, int],  # syscall, errno_location; numbers: io_submit, io_getevents
    context: int,  # of io_setup
    firsts: Longs,  # [parts], as of `read_ahead`
    fds: Longs,  # [parts], open for reads past the page cache
    offsets: Longs,  # [parts]
    numbers: Longs,  # [n], the rows to read
    rows: int,  # the address of the memory for them, [n, width]
    width: int,
    block: int,  # places and lengths on the device are multiples of it
    staging: int,  # the address of memory for whole blocks, [depth, room], aligned
    room: int,  # enough for a row, wherever it begins in a block
    requests: Longs,  # [depth, 8], a `struct iocb` each
    events: Longs,  # [depth, 4], a `struct io_event` each
    stop: Longs,  # [2], as of `read_ahead`
    seen: Longs,  # [4], as of `read_ahead`
) -> int:
    """Read rows past the page cache, many at a time: Linux AIO.

    Returns 0, or the number of the error; no read is under way then, unless `seen` says so.
    """
    syscall, errno_location, submit, getevents = calls
    depth = requests.shape[0]
    free = np.arange(depth)
    which = np.zeros(depth, np.int64)
    pointers = np.zeros(depth, np.int64)
    unused = depth
    begun = 0
    ended = 0
    failed = numbers.shape[0]
    error = 0
    while True:
        if stop[0] and not error:
            error = STOPPED
        count = 0
        if not error and (unused >= depth >> 3 or begun + unused >= numbers.shape[0]):
            while unused and begun + count < numbers.shape[0]:
                unused -= 1
                slot = free[unused]
                at = begun + count
                part = owner_of(firsts, numbers[at])
                begin = offsets[part] + (numbers[at] - firsts[part]) * width
                low = begin - begin % block
                high = begin + width + (-(begin + width)) % block
                request = requests[slot]
                request[0] = slot
                request[1] = 0
                request[2] = fds[part] << 32
                request[3] = staging + slot * room
                request[4] = high - low
                request[5] = low
                request[6] = 0
                request[7] = 0
                which[slot] = at
                pointers[count] = request.ctypes.data
                count += 1
        sent = 0
        while sent < count:
            there = pointers.ctypes.data + 8 * sent
            taken = call4(syscall, submit, context, count - sent, there)
            if taken > 0:
                sent += taken
                continue
            trouble = errno(errno_location)
            if trouble == _EINTR:
                continue
            if trouble != _EAGAIN or begun + sent == ended:
                error = trouble
                failed = min(failed, begun + sent)
            break
        for back in range(count - 1, sent - 1, -1):  # those that were not taken
            free[unused] = requests[(pointers[back] - requests.ctypes.data) // 64, 0]
            unused += 1
        begun += sent
        if begun == ended:
            if error or begun == numbers.shape[0]:
                break
            continue
        count = call6(syscall, getevents, context, 1, depth, events.ctypes.data, 0)
        for i in range(count):
            slot = events[i, 0]
            at = which[slot]
            part = owner_of(firsts, numbers[at])
            begin = offsets[part] + (numbers[at] - firsts[part]) * width
            ahead = begin % block
            got = events[i, 2]
            if got >= ahead + width:
                copy(rows + at * width, staging + slot * room + ahead, width)
            elif at < failed:
                failed = at
                error = -got if got < 0 else ENDS_EARLY
            free[unused] = slot
            unused += 1
        ended += max(count, 0)
        stop[1] += max(count, 0)
        if count < 0 and errno(errno_location) != _EINTR:
            seen[0], seen[1], seen[2], seen[3] = errno(errno_location), 0, begun, begun - ended
            return seen[0]
    seen[0], seen[1], seen[2] = error, failed % max(numbers.shape[0], 1), begun
    return error
