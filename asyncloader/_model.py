"""What of a model can be loaded."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .table import HashTable

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["targets"]

_log = logging.getLogger(__name__)

_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""What `torch.compile`, FSDP and activation checkpointing call the module that they wrap."""


def targets(model: nn.Module) -> tuple[dict[str, HashTable], dict[str, Tensor]]:
    """Return the hash tables of a model by their names, and the tensors of its `state_dict()`.

    Both are the model's own, not copies: what is loaded into them is loaded into the model. Values
    of the `state_dict()` that are no tensors are left out.

    Names are those of the model itself, whatever wraps it or parts of it: `_orig_mod.` of
    `torch.compile`, `module.` of `DistributedDataParallel` and `DataParallel`, and
    `_fsdp_wrapped_module.` of FSDP are taken off. So what is saved of a wrapped model can be loaded
    into a bare one, and the other way round.

    ```python
    await Loader(path, *targets(model)).aload()
    ```

    Args:
        model: With tables anywhere below it, or a table itself.

    Raises:
        TypeError: If it is no module.
        ValueError: If two tables have the same name, or two tensors once wrappers are taken off.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    tables: dict[str, HashTable] = {}
    paths: dict[str, str] = {}
    for path, table in _tables(model):
        if table.name in tables:
            raise ValueError(
                f"two tables are named {table.name!r}, {paths[table.name]!r} and {path!r}: "
                "give one of them another name, it is what stands on disk"
            )
        tables[table.name], paths[table.name] = table, path
    values = model.state_dict().items()
    return tables, _unwrapped(
        model, {name: value for name, value in values if isinstance(value, Tensor)}
    )


def _tables(model: nn.Module) -> Iterator[tuple[str, HashTable]]:
    """Yield each table once, with its path."""
    for path, module in model.named_modules():
        if isinstance(module, HashTable):
            yield path, module


def _unwrapped(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take off names what wrappers of modules have put there."""
    prefixes = sorted(_wrappers(model), key=len, reverse=True)  # from within
    if not prefixes:
        return tensors
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        bare = name
        for prefix in prefixes:
            if bare.startswith(prefix):
                outer = prefix[:-1].rpartition(".")[0]
                bare = f"{outer}{'.' if outer else ''}{bare.removeprefix(prefix)}"
        if bare in found:
            raise ValueError(
                f"two tensors are named {bare!r} once the wrapper of {name!r} is taken off: give "
                "one of them another name"
            )
        found[bare] = tensor
    if found.keys() != tensors.keys():
        _log.info("names of tensors are those without wrappers: taken off were %s", prefixes)
    return found


def _wrappers(model: nn.Module) -> Iterator[str]:
    """Yield what names begin with below each module that wraps another one."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    for path, module in model.named_modules(remove_duplicate=False):
        for child, _ in module.named_children():
            if child in _WRAPPED or (child == "module" and isinstance(module, parallel)):
                yield f"{path}{'.' if path else ''}{child}."
