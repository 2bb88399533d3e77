"""The tables and tensors of a model that a load can fill."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ._disk_table.table import DiskTable
from ._display import listed
from ._table.hashtable import HashTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["targets"]

_log = logging.getLogger(__name__)

_EXTRA_STATE = "_extra_state"  # ends the names of values that `get_extra_state()` returns
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",  # of torch.compile
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "ActivationWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
"""By class, the name that a wrapper of torch gives the module that it wraps. To import the classes
would take seconds."""


def targets(model: nn.Module) -> tuple[dict[str, HashTable | DiskTable], dict[str, Tensor]]:
    """Return the hash tables of a model by their names, and the tensors of its `state_dict()`.

    Both are the model's own, not copies: a load into them is a load into the model. Values of the
    `state_dict()` that are no tensors are left out. So are tensors that `get_extra_state()` makes
    anew each time; a warning names them.

    Names are those of the model without wrappers: `_orig_mod.` of `torch.compile`, `module.` of
    `DistributedDataParallel` and `DataParallel`, and `_fsdp_wrapped_module.` of FSDP are taken off.
    So the checkpoint of a wrapped model can be loaded into a bare one, and the other way round.

    ```python
    await Loader(path, *targets(model)).aload()
    ```

    Args:
        model: A module with tables anywhere below it, or a table itself.

    Raises:
        TypeError: If it is no module.
        ValueError: If two tables have the same name, or two tensors have without wrappers; or if
            the `state_dict()` holds copies of the model's tensors, as a full one of FSDP does.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    tables: dict[str, HashTable | DiskTable] = {}
    paths: dict[str, str] = {}
    for path, table in model.named_modules():  # each once
        if not isinstance(table, HashTable | DiskTable):
            continue
        if table.name in tables:
            raise ValueError(
                f"two tables are named {table.name!r}, {paths[table.name]!r} and {path!r}: "
                "give one of them another name, it is what stands on disk"
            )
        tables[table.name], paths[table.name] = table, path
    return tables, _unwrapped(model, _without_copies(model, _state(model)))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {name: one for name, one in model.state_dict().items() if isinstance(one, Tensor)}


def _without_copies(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Leave out extra state that is made anew each time; refuse other tensors that are."""
    own = {_memory(one) for one in (*model.parameters(), *model.buffers())} | {None}
    doubtful = [name for name, tensor in tensors.items() if _memory(tensor) not in own]
    again = _state(model) if doubtful else {}
    # Both are alive: only a tensor that the model keeps lies in the same place twice.
    kept = {name: _memory(tensor) for name, tensor in again.items()}
    copies = [name for name in doubtful if _memory(tensors[name]) != kept.get(name)]
    refused = tuple(name for name in copies if not name.endswith(_EXTRA_STATE))
    if refused:
        raise ValueError(
            f"state_dict() makes copies of {listed(refused)}: what is loaded into them would not "
            "be in the model. To save them, pass state_dict() itself to Saver"
        )
    if copies:
        _log.warning(
            "left out, since what is loaded into a copy is not in the model: %s, which "
            "get_extra_state() makes anew each time; save and restore it by yourself",
            listed(tuple(copies)),
        )
    return {name: tensor for name, tensor in tensors.items() if name not in set(copies)}


def _memory(tensor: Tensor) -> tuple[torch.device, int] | None:
    """Return where a tensor lies; `None` if it has no memory, or is of a kind that does not say."""
    try:
        address = tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError, ValueError):  # a lazy module's raises the last one
        return None
    return (tensor.device, address) if address else None


def _unwrapped(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the parts that wrappers have added off the names."""
    found: dict[str, Tensor] = {}
    taken_off: set[str] = set()
    for name, tensor in tensors.items():
        bare = ".".join(_bare(model, name.split("."), taken_off))
        if bare in found:
            raise ValueError(
                f"two tensors are named {bare!r} once the wrapper of {name!r} is taken off: give "
                "one of them another name"
            )
        found[bare] = tensor
    if taken_off:
        parts = sorted(taken_off)
        _log.info("names of tensors are those without wrappers: taken off were %s", parts)
    return found


def _bare(module: nn.Module, parts: Sequence[str], taken_off: set[str]) -> Iterator[str]:
    """Yield the parts of a name that no wrapper has added, from `module` on."""
    for at, part in enumerate(parts):
        # Some wrappers take their own part off by a hook, so they are passed without one.
        while part not in module._modules and (inner := _wrapped(module)):  # noqa: SLF001
            module = module._modules[inner] or module  # noqa: SLF001
        child = module._modules.get(part)  # noqa: SLF001  # a wrapper shows those below as its own
        if child is None:
            yield from parts[at:]
            return
        if part == _wrapped(module):
            taken_off.add(f"{part}.")
        else:
            yield part
        module = child


def _wrapped(module: nn.Module) -> str | None:
    """Return the name of the module that a wrapper wraps; `None` if this is no wrapper."""
    for kind in type(module).__mro__:
        if kind.__module__.startswith("torch.") and kind.__name__ in _WRAPPERS:
            child = _WRAPPERS[kind.__name__]
            return child if module._modules.get(child) is not None else None  # noqa: SLF001
    return None
