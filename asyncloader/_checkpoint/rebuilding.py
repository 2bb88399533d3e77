"""What the functions that `torch.save` pickles make: descriptions of tensors. None is called.

The names are those of `torch/_utils.py`, `torch/serialization.py` and
`torch/_weights_only_unpickler.py` (https://github.com/pytorch/pytorch); any other is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from reprlib import repr as shown  # shortens, and takes lists nested a thousand deep
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


_LARGE = 1 << 62  # more than any size
_FEW = 8
_MOST_DIMENSIONS = 64  # as torch has it
_PARTS = 5  # of a persistent id
# What other functions of these would make is left out: values, and tensors of kinds of their own.
_LIBRARIES = ("torch.", "numpy.")
_STORAGES = {
    "Bool": "bool",
    "Byte": "uint8",
    "Char": "int8",
    "Short": "int16",
    "Int": "int32",
    "Long": "int64",
    "Half": "float16",
    "BFloat16": "bfloat16",
    "Float": "float32",
    "Double": "float64",
    "ComplexFloat": "complex64",
    "ComplexDouble": "complex128",
}


class PickleError(ValueError):
    """A pickle is damaged, or asks for what is not done here."""


@dataclass(eq=False, slots=True)
class Storage:
    """Bytes that tensors are views of.

    Attributes:
        key: Its name: the entry `data/KEY` of the archive.
        dtype: Of its elements; `None` if its tensors say that.
        count: Elements; bytes if it has no dtype.
    """

    key: str
    dtype: str | None
    count: int


@dataclass(eq=False, slots=True)
class Tensor:
    """A strided view of a storage.

    Attributes:
        storage: Holds its elements.
        dtype: As torch spells it.
        offset: Of its first element, in elements.
        shape: Its dimensions.
        stride: Elements from one to the next, by dimension.
    """

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def is_contiguous(self) -> bool:
        """Whether its elements lie one after the other, in their order."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return 0 in self.shape
            expected *= size
        return True


@dataclass(frozen=True, slots=True)
class Refused:
    """A tensor of a kind that is not read.

    Attributes:
        kind: Its kind, in words.
    """

    kind: str


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle asks for.

    Attributes:
        name: Module and name, with a dot between.
    """

    name: str


def storage_of(saved: object) -> Storage:
    """Return the storage that a persistent id describes."""
    if type(saved) is tuple and len(saved) == _PARTS:
        word, kind, key, _, count = saved
        sound = word == "storage" and type(kind) is Global and type(key) is str
        if sound and type(count) is int and 0 <= count < _LARGE:
            return Storage(key, _dtype_of(kind.name), count)
    raise PickleError("a storage is described in a way that is not read")


@lru_cache(100)
def _dtype_of(storage: str) -> str | None:
    module, _, name = storage.rpartition(".")
    if name == "UntypedStorage" and module == "torch.storage":
        return None
    dtype = _STORAGES.get(name.removesuffix("Storage"))
    return dtype or f"of {storage}"  # quantised, say: its tensors are refused


def _sizes(value: object) -> tuple[int, ...]:
    if type(value) is tuple and len(value) <= _MOST_DIMENSIONS:
        for one in value:
            if type(one) is not int or not 0 <= one < _LARGE:
                break
        else:
            return value
    raise PickleError(f"{shown(value)} is no shape, and no strides")


def _tensor(
    storage: object, offset: object, shape: object, stride: object, *rest: object
) -> Tensor | Refused:
    if not isinstance(storage, Storage) or type(offset) is not int or not 0 <= offset < _LARGE:
        raise PickleError("a tensor without a storage")
    dtype = storage.dtype
    for one in rest:
        if isinstance(one, Global) and one.name.startswith("torch."):  # of `_rebuild_tensor_v3`
            dtype = one.name.removeprefix("torch.")
        elif type(one) is dict and one and (len(one) > _FEW or any(one.values())):
            # Conjugated or negated, lazily.
            return Refused(f"tensor with {shown(list(one))}")
    found = Tensor(storage, dtype or "uint8", offset, _sizes(shape), _sizes(stride))
    if len(found.shape) != len(found.stride):
        raise PickleError(f"a shape {list(found.shape)} with strides {list(found.stride)}")
    return found


def _first(first: object, *_: object) -> object:
    return first


def _nothing(*_: object) -> dict[object, object]:
    return {}


def _ordered_dict(*filled: object) -> dict[object, object]:
    """Of a call without arguments: Python fills it afterwards."""
    if filled:
        raise PickleError("an OrderedDict that is made of a list is not read")
    return {}


def _opaque(kind: str) -> Callable[..., object]:
    """Return a function that does not look at its arguments: the value holds no tensor."""
    return lambda *_: Global(kind)


def _refused(kind: str) -> Callable[..., object]:
    return lambda *_: Refused(kind)


_CALLED: dict[str, Callable[..., object]] = {
    "_codecs.encode": _opaque("bytes"),
    "builtins.set": _opaque("set"),
    "__builtin__.set": _opaque("set"),
    "builtins.complex": _opaque("number"),
    "builtins.bytearray": _opaque("bytes"),
    "__builtin__.complex": _opaque("number"),
    "__builtin__.bytearray": _opaque("bytes"),
    "collections.Counter": _nothing,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _nothing,
    "torch.Size": _first,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch.device": _opaque("device"),
    "torch.serialization._get_layout": _opaque("layout"),
    "torch._tensor._rebuild_from_type_v2": _refused("tensor of a class of its own"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _refused("tensor of another device"),
    "torch._utils._rebuild_device_tensor_from_numpy": _refused("tensor of another device"),
    "torch._utils._rebuild_meta_tensor_no_storage": _refused("tensor on the meta device"),
    "torch._utils._rebuild_nested_tensor": _refused("nested tensor"),
    "torch._utils._rebuild_qtensor": _refused("quantised tensor"),
    "torch._utils._rebuild_sparse_csr_tensor": _refused("sparse tensor"),
    "torch._utils._rebuild_sparse_tensor": _refused("sparse tensor"),
    "torch._utils._rebuild_wrapper_subclass": _refused("tensor of a class of its own"),
}


def known(name: str) -> Global:
    """Return a name that a pickle may ask for."""
    if name in _CALLED or name.startswith(_LIBRARIES):
        return Global(name)
    raise PickleError(f"it asks for {name[:200]!r}, which a file of tensors has no need of")


def called(name: str, arguments: tuple[object, ...]) -> object:
    function = _CALLED.get(name)
    if function is None:
        if name.startswith("torch."):
            return Refused(f"value that {name[:100]} makes")
        return Global(name)
    try:
        return function(*arguments)
    except TypeError as error:
        raise PickleError(f"{name} with arguments that it does not take") from error
