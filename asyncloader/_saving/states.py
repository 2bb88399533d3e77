"""What a trainer resumes from beside tables and tensors: `extra.pt`, and each rank's `io_state`."""

from __future__ import annotations

import copy
import io
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from asyncloader._checkpoint.format import EXTRA, IO_COUNT, IO_STATE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from asyncloader._storage.folder import WritableFile, WritableFolder


_BUFFER = 1 << 20
_GLOBAL = re.compile(
    r"GLOBAL ([\w.]+)|(?:global|class|function|Type) (?:<class \')?([\w.]+\.[\w.]+)"
)
_PLAIN = {torch.Tensor, torch.nn.Parameter}


@dataclass(slots=True)
class States:
    """The values of this moment: of `extra` and `io_state` as they are when this is made.

    Lists and dicts are copied, tensors are not: `changed` tells whether one was written to.

    Raises:
        ValueError: If they are nested without end.
    """

    rank: int
    ranks: int
    extra: Mapping[str, object] | None
    io_state: Mapping[str, object] | None
    _tensors: list[tuple[torch.Tensor, int]] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        if self.rank:
            self.extra = None  # rank 0 saves its own
        if self.extra is not None:
            self.extra = {name: _state_of(value) for name, value in self.extra.items()}
        try:
            self.extra, self.io_state = self._kept(self.extra), self._kept(self.io_state)
        except RecursionError as error:
            raise ValueError("extra and io_state: a value holds itself, or is too deep") from error

    def _kept(self, value: Any) -> Any:  # noqa: ANN401  # any value of a state dict
        def keep(tensor: torch.Tensor) -> torch.Tensor:
            bare = tensor.detach()  # without hooks and attributes, which torch.save would save
            self._tensors.append((bare, _version_of(bare)))
            return bare

        return _copied(value, keep)

    @property
    def files(self) -> list[str]:
        """The names of the files of this rank."""
        return list(self._contents())

    def _contents(self) -> dict[str, object]:
        found: dict[str, object] = {}
        if self.extra is not None:
            found[EXTRA] = self.extra
        if self.io_state is not None:
            found[IO_STATE.format(rank=self.rank)] = self.io_state
        if found and not self.rank:
            found[IO_COUNT] = str(self.ranks)  # as text, not pickled
        return found

    def check(self) -> None:
        """Raise `ValueError` for what torch cannot save, or `weights_only=True` cannot read."""
        for file, value in self._contents().items():
            _check(file, _copied(value, _stand_in))

    def changed(self) -> list[str]:
        """Return the names of files of which a tensor was written to since."""
        is_so = any(_version_of(tensor) != version for tensor, version in self._tensors)
        return [file for file in self.files if is_so and file != IO_COUNT]

    def write(self, folder: WritableFolder, under: str) -> dict[str, tuple[int, str]]:
        """Write the files, sync them, and return the length and the digest of each."""
        return {
            file: _write(folder, f"{under}/{file}", value)
            for file, value in self._contents().items()
        }


def _version_of(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version  # noqa: SLF001  # torch has no other


def _state_of(value: object) -> object:
    """Return the state of an optimizer, say, as RecIS asks for it."""
    ask = getattr(value, "state_dict", None)
    return ask() if callable(ask) else value


def _copied(value: Any, each: Callable[[torch.Tensor], torch.Tensor]) -> Any:  # noqa: ANN401
    """Copy dicts, lists and tuples; let `each` replace the tensors in them."""
    if isinstance(value, torch.Tensor):
        return each(value)
    if isinstance(value, dict):
        made = copy.copy(value)  # of its class, with its attributes
        for key, one in value.items():
            made[key] = _copied(one, each)
        return made
    if type(value) in {list, tuple}:
        return type(value)([_copied(one, each) for one in value])
    return copy.copy(value) if type(value) in {set, bytearray} else value


def _stand_in(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that is saved in the same way, and takes no room."""
    plain = type(tensor) in _PLAIN and tensor.layout == torch.strided and not tensor.is_quantized
    return tensor.new_empty(0) if plain else tensor


def _check(file: str, value: object) -> None:
    content = io.BytesIO()
    try:
        torch.save(value, content)
    except Exception as error:
        raise ValueError(f"{file}: torch cannot save what was given for it: {error}") from error
    content.seek(0)
    try:
        torch.load(content, weights_only=True, map_location="cpu")
    except Exception as error:
        found = _GLOBAL.search(str(error))
        what = f"an object of {found[1] or found[2]}" if found else "something"
        raise ValueError(
            f"{file} would hold {what}, which torch.load(weights_only=True) does not read: pass "
            "tensors, numbers, text, bytes, and lists, tuples and dicts of those"
        ) from error


class _Bytes(io.RawIOBase):
    """A file that takes bytes one after the other, and digests them."""

    def __init__(self, file: WritableFile) -> None:
        import xxhash  # noqa: PLC0415  # takes time to import, and not every program saves

        super().__init__()
        self._file = file
        self.length = 0
        self.digest = xxhash.xxh3_128()
        self.error: OSError | None = None  # torch hides it behind one of its own

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:  # noqa: ANN401  # anything that has bytes
        view = memoryview(data).cast("B")
        try:
            self._file.write(self.length, [view])
        except OSError as error:
            self.error = error
            raise
        self.digest.update(view)
        self.length += view.nbytes
        return view.nbytes


def _write(folder: WritableFolder, name: str, value: object) -> tuple[int, str]:
    file = folder.create(name)
    try:
        out = _Bytes(file)
        if isinstance(value, str):
            out.write(value.encode())
        else:
            try:
                with io.BufferedWriter(out, _BUFFER) as buffered:
                    torch.save(value, buffered)
            except Exception as error:
                if out.error is not None:
                    raise out.error from error
                raise
        file.sync()
    finally:
        file.close()
    return out.length, out.digest.hexdigest()
